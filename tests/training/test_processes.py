"""Training with several processes gives the results of a single one, dropout included."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import processes
from blipfit import grid
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime import distributed, sharding
from blipfit.training import events, loop, model_cache
from blipfit.training.model_cache import ModelCache

LEARNING = ("training.batch_size=3", "training.accumulation=2", "training.max_epochs=2", "training.learning_rate=0.01")
"""Two steps per epoch; two processes have 2 and 1 rows of a micro-batch, three have 1 each."""


@pytest.fixture
def recipes(small: dict[str, Path], family: str) -> Callable[..., list[Recipe]]:
    """A bank of two experiments: LoRA in the Q-Former alone, and in the language model too."""

    def make(*changes: str) -> list[Recipe]:
        names = (28, 32) if family == "t5" else (60, 64)
        return [grid.recipe("iconqa", name, str(small[family])).override([*LEARNING, *changes]) for name in names]

    return make


@pytest.fixture
def train(iconqa: Path, tmp_path: Path) -> Callable[..., list[Run]]:
    """Train in `count` processes, in a folder below `tmp_path`."""

    def run(recipes: list[Recipe], count: int, folder: str = "results", **options: Any) -> list[Run]:
        def work() -> list[Run]:
            cache = ModelCache("cpu", store=tmp_path / f"features-{folder}")
            return loop.train(recipes, iconqa, tmp_path / folder, model_cache=cache, **options)

        return processes.run(count, work)[0] if count > 1 else work()

    return run


@pytest.fixture(scope="module")
def finished() -> dict[str, list[Run]]:
    """The runs of a single process by family."""
    return {}


@pytest.fixture
def single(finished, recipes, train, family, tmp_path_factory) -> list[Run]:
    """The same experiments trained by a single process."""
    if family not in finished:
        finished[family] = train(recipes(), 1, str(tmp_path_factory.mktemp("single")))
    return finished[family]


def _scores(run: Run) -> list[float]:
    lines = [json.loads(line) for line in run.predictions_file.read_text().splitlines()]
    return [candidate["sum"] for line in lines for candidate in line["candidates"]]


def _assert_same(run: Run, single: Run) -> None:
    result, expected = run.result(), single.result()
    losses = [line["loss"] for line in result["history"]]
    assert losses == pytest.approx([line["loss"] for line in expected["history"]], rel=1e-5)
    assert [line["val_accuracy"] for line in result["history"]] == [
        line["val_accuracy"] for line in expected["history"]
    ]
    assert result["best_epoch"] == expected["best_epoch"]
    assert result["metrics"] == expected["metrics"]
    assert _scores(run) == pytest.approx(_scores(single), rel=1e-4)


@pytest.mark.parametrize("count", [2, 3])
def test_several_processes_equal_a_single_one(recipes, train, single, count):
    for run, expected in zip(train(recipes(), count), single, strict=True):
        _assert_same(run, expected)


def test_another_number_of_processes_continues_a_run(recipes, train, single):
    def stop(event: events.Event) -> None:
        if isinstance(event, events.EpochDone):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipes(), 1, listener=stop)
    for run, expected in zip(train(recipes(), 3), single, strict=True):
        _assert_same(run, expected)


def test_a_sharded_language_model_gives_the_same_results(recipes, train, single):
    for run, expected in zip(train(recipes("performance.shard_language_model=true"), 2), single, strict=True):
        result = run.result()
        _assert_same(run, expected)
        assert result["total_parameters"] == expected.result()["total_parameters"]


def test_each_process_holds_its_share_of_the_language_model(recipes):
    recipe = recipes("performance.shard_language_model=true")[0]

    def count() -> tuple[int, int, int]:
        backbone = ModelCache("cpu").backbone(recipe)
        weights = [p for layer in backbone.layers("answer") for p in layer.parameters()]
        shares = [sharding.local_tensor(weight) for weight in weights]
        return sum(p.numel() for p in weights), sum(p.numel() for p in shares), len(weights)

    (total, first, tensors), (_, second, _) = processes.run(2, count)
    assert tensors > 10
    assert first + second == total
    assert abs(first - second) < 0.2 * total


@pytest.mark.parametrize(
    "change", ["performance.cuda_graphs=true", "model.quantization=8bit", "adapter.method=dora", "distillation"]
)
def test_what_cannot_be_sharded_is_refused(recipes, change, small, family):
    change = f"distillation.teacher={small[family]}" if change == "distillation" else change
    recipe = recipes("performance.shard_language_model=true", change)[1]
    with pytest.raises(UserError, match="exclude each other"):
        model_cache.refuse_conflicting_settings(recipe)


def test_a_trial_of_a_process_without_memory_ends_the_trial_of_all(recipes, iconqa, monkeypatch):
    from blipfit.model.image_features import ImageFeatures
    from blipfit.training import bank_trials

    def measure() -> Any:
        cache, members = ModelCache("cpu"), recipes()
        backbone = cache.backbone(members[0])
        encoded, features = cache.splits(members[0], iconqa)["train"], ImageFeatures.from_backbone(backbone, "off")
        trial = bank_trials.measure(backbone, members, encoded, features)
        with pytest.MonkeyPatch.context() as patch:
            if distributed.state().process_index == 1:
                patch.setattr(bank_trials.Stepper, "_backward", _run_out_of_memory)
            return trial, bank_trials.measure(backbone, members, encoded, features)

    (first, none), (second, also_none) = processes.run(2, measure)
    assert first == second
    assert first.experiments == 2
    assert first.seconds > 0 < first.evaluation_seconds
    assert none is also_none is None


def _run_out_of_memory(*arguments: Any) -> None:
    raise torch.OutOfMemoryError
