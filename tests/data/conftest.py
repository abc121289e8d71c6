"""Small data sets in the official layouts, and a vision tower with images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.data import feature_store
from blipfit.data.feature_store import FeatureSpec
from blipfit.model import image_features, loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig
from image_tower import compute_features

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture
def shared() -> Path:
    """Folder with real data of the authors; tests that need it are skipped elsewhere."""
    if not SHARED.is_dir():
        pytest.skip(f"no real data at {SHARED}")
    return SHARED


@pytest.fixture
def draw() -> Callable[..., Path]:
    """Write a PNG of random pixels: `draw(path, seed)`."""
    return _draw


def _draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return path


def _problem(number: int, **fields) -> dict:
    """A ScienceQA entry with the official fields in the official order."""
    return {
        "question": f"Question {number}?",
        "choices": ["alpha", "beta", "gamma"],
        "answer": number % 3,
        "hint": "" if number % 2 else f"Hint {number}.",
        "image": "image.png",
        "task": "closed choice",
        "grade": f"grade{number % 12 + 1}",
        "subject": "natural science",
        "topic": "biology",
        "category": "Ecosystems",
        "skill": "Interpret food webs",
        "lecture": f"Lecture {number}, naïve.",
        "solution": "Because.",
        "split": "train",
    } | fields


@pytest.fixture
def official_scienceqa(tmp_path: Path) -> Path:
    """Problems 1–8: train 3, 1, 2 (2 has no image), val 4, 5, test 6, 7, 8; deliberately not in order."""
    root = tmp_path / "official"
    splits = {"train": ["3", "1", "2"], "val": ["4", "5"], "test": ["6", "7", "8"]}
    problems = {}
    for split, pids in splits.items():
        for pid in pids:
            problems[pid] = _problem(int(pid), split=split, image=None if pid == "2" else "image.png")
            if pid != "2":
                _draw(root / "images" / split / pid / "image.png", int(pid))
    root.mkdir(exist_ok=True)
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps(splits | {"trainval": []}))
    return root


@pytest.fixture
def official_iconqa(tmp_path: Path) -> Path:
    """Three choose_txt problems, one per split, and one problem of each other type."""
    root = tmp_path / "iconqa_data"
    problems = {}
    for pid, split in (("12", "test"), ("7", "train"), ("9", "val")):
        problems[pid] = {
            "question": "What time is it?",
            "choices": ["6:00 A.M.", "6:00 P.M.", "naïve"],
            "answer": 1,
            "ques_type": "choose_txt",
            "grade": "grade2",
            "label": "Q7",
            "split": split,
        }
        _draw(root / split / "choose_txt" / pid / "image.png", int(pid))
    problems["1"] = problems["7"] | {"ques_type": "choose_img", "choices": ["choice_0.png", "choice_1.png"]}
    blank = {key: value for key, value in problems["7"].items() if key != "choices"}
    problems["2"] = blank | {"ques_type": "fill_in_blank", "answer": "19"}
    (root / "problems.json").write_text(json.dumps(problems))
    return root


@pytest.fixture(scope="module")
def tower() -> Backbone:
    """The miniature, for its vision tower."""
    return loading.load(ModelConfig(name="tiny-t5"))


@pytest.fixture(scope="module")
def spec(tower: Backbone) -> FeatureSpec:
    return image_features.feature_spec(tower)


@pytest.fixture(scope="module")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """21 images of random pixels, `0.png` to `20.png`."""
    folder = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(3)
    for n in range(21):
        values = generator.integers(0, 256, (20 + n, 50, 3), dtype=np.uint8)
        Image.fromarray(values).save(folder / f"{n}.png")
    return [folder / f"{n}.png" for n in range(21)]


@pytest.fixture(scope="module")
def exact_features(tower: Backbone, image_paths: list[Path]) -> torch.Tensor:
    """The tower's features of each image, not rounded."""
    return compute_features(tower, image_paths)


@pytest.fixture
def six_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards of 4 images, so that 21 images need six shards."""
    monkeypatch.setattr(feature_store, "SHARD_IMAGES", 4)
