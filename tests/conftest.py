"""What tests of several rooms share: small checkpoints of both families and a small data set, written once."""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from PIL import Image

import checkpoints
from blipfit import grid
from blipfit.model.backbone import Backbone
from blipfit.run_folder import Run
from blipfit.runtime import layer_execution, onednn
from blipfit.training import loop

# Several test processes run side by side, and arithmetic threads that wait for each other cost more than they bring.
torch.set_num_threads(1)

COUNTS = {"train": 12, "val": 6, "test": 5}

COMPILER_WARNINGS = (
    r"ignore::DeprecationWarning:torch\..*",
    "ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning",
)
"""What torch's compiler says of its own code; it means to hide the second, and cannot where warnings are errors."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "fresh_compiler" in getattr(item, "fixturenames", ()):
            for warning in COMPILER_WARNINGS:
                item.add_marker(pytest.mark.filterwarnings(warning))


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Nothing that a test stores lands in the user's cache; processes started by tests inherit it."""
    os.environ["BLIPFIT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def no_setting_left() -> Iterator[None]:
    """A test that leaves oneDNN's setting changed fails itself, not whichever comes after it."""
    setting = getattr(torch.backends.mkldnn.matmul, "fp32_precision", None)
    yield
    assert onednn._open_contexts == 0
    assert getattr(torch.backends.mkldnn.matmul, "fp32_precision", None) == setting


@pytest.fixture(params=[1, pytest.param(20, marks=pytest.mark.slow)], ids=["few examples", "many examples"])
def for_all(request: pytest.FixtureRequest) -> Callable[..., None]:
    """Check a property: `for_all(100, check, strategy, …)` calls `check(value, …)` with 100 examples, in the slow tier
    with 20 times as many. The examples are the same in every run."""

    def run(examples: int, check: Callable[..., None], *strategies: Any) -> None:
        options = {"deadline": None, "derandomize": True, "database": None, "suppress_health_check": list(HealthCheck)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Generating overly large repr")  # it would hide the failure itself
            settings(max_examples=examples * request.param, **options)(given(*strategies)(check))()

    return run


@pytest.fixture(params=checkpoints.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of both families with the project's own small tokenizers."""
    root = tmp_path_factory.mktemp("small")
    return {f: checkpoints.write(root / f, f, checkpoints.own_tokenizers(f)) for f in checkpoints.FAMILIES}


@pytest.fixture(scope="session")
def hub_like(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of both families with the published T5, LLaMA and BERT vocabularies."""
    if not checkpoints.TOKENIZERS.is_dir():
        pytest.skip(f"no real tokenizers at {checkpoints.TOKENIZERS}")
    root = tmp_path_factory.mktemp("hub_like")
    return {f: checkpoints.write(root / f, f, checkpoints.real_tokenizers(f)) for f in checkpoints.FAMILIES}


@pytest.fixture
def backbone(small: dict[str, Path], family: str) -> Backbone:
    """A freshly loaded small model of the family under test, fp32."""
    return checkpoints.load(small[family])


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """A compiler that has compiled nothing yet; what a test compiles is not left to later ones."""
    limit = torch._dynamo.config.recompile_limit

    def forget() -> None:
        torch._dynamo.config.recompile_limit = limit
        layer_execution._COMPILED.clear()
        torch._dynamo.reset()

    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def iconqa(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared IconQA folder of random pictures, with two to four choices a question."""
    root = tmp_path_factory.mktemp("iconqa")
    draws = np.random.default_rng(7)
    (root / "annotations").mkdir()
    number = 100
    for split, count in COUNTS.items():
        entries = []
        for _ in range(count):
            number += 1
            picture = root / split / "choose_txt" / str(number) / "image.png"
            picture.parent.mkdir(parents=True)
            Image.fromarray(draws.integers(0, 256, (40, 48, 3), dtype=np.uint8)).save(picture)
            choices = [f"{word} {number}" for word in ("red", "blue", "green", "a large")]
            choices = choices[: 2 + number % 3]
            entries.append(
                {
                    "question": f"Which {'of the many ' * (number % 4)}number is {number}?",
                    "choices": choices,
                    "answer": len(choices) - 1,  # which can be learned
                    "ques_type": "choose_txt",
                    "grade": "grade1",
                    "label": "A1",
                    "split": split,
                    "id": str(number),
                }
            )
        (root / "annotations" / f"{split}.json").write_text(json.dumps(entries))
    return root


@pytest.fixture
def finished_run(small: dict[str, Path], family: str, iconqa: Path, tmp_path: Path) -> Run:
    """Experiment 31 on a small model, trained for one epoch."""
    changes = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=1", "data.images=off"]
    changes += ["training.learning_rate=0.03", "training.max_target_tokens=4"]
    recipe = grid.recipe("iconqa", 31, str(small[family])).override(changes)
    (run,) = loop.train([recipe], iconqa, tmp_path / "results", device="cpu")
    return run
