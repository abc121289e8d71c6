"""Data sets by name; what importing them costs."""

import subprocess
import sys
from pathlib import Path

import pytest

from blipfit import data
from blipfit.data.prompts import PROMPTS
from blipfit.errors import UserError


@pytest.fixture
def prepared(official_scienceqa: Path, tmp_path: Path) -> Path:
    data.prepare("scienceqa", official_scienceqa, tmp_path / "sqa")
    return tmp_path / "sqa"


def test_every_data_set_has_its_own_name_and_a_known_prompt():
    for name, dataset in data.DATA_SETS.items():
        assert dataset.name == name
        assert dataset.prompt in PROMPTS


def test_load_and_limit(prepared: Path):
    assert [q.id for q in data.load("scienceqa", prepared, "test")] == ["6", "7", "8"]
    assert [q.id for q in data.load("scienceqa", prepared, "test", limit=2)] == ["6", "7"]
    assert len(data.load("scienceqa", prepared, "test", limit=99)) == 3


def test_mistakes_are_errors_with_a_fix(prepared: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"unknown data set 'sciencqa'; did you mean 'scienceqa'\?"):
        data.load("sciencqa", prepared, "train")
    with pytest.raises(UserError, match="unknown data set 'q'; known: scienceqa, iconqa, icons, own"):
        data.get_data_set("q")
    with pytest.raises(UserError, match="unknown split 'dev'; known: train, val, test"):
        data.load("scienceqa", prepared, "dev")
    with pytest.raises(UserError, match="limit is 0"):
        data.load("scienceqa", prepared, "train", limit=0)
    with pytest.raises(UserError, match="nowhere does not exist; run `blipfit prepare scienceqa"):
        data.load("scienceqa", tmp_path / "nowhere", "train")
    (prepared / "scienceqa_train.json").write_text("[]")
    with pytest.raises(UserError, match="has no scienceqa questions in split train"):
        data.load("scienceqa", prepared, "train")


def test_importing_is_cheap():
    code = "import blipfit.data, sys; print([m for m in ('torch', 'datasets', 'numpy', 'PIL') if m in sys.modules])"
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"


def test_reading_data_needs_no_torch():
    code = (
        "import sys; from blipfit.data import scienceqa, iconqa, own, images;"
        "print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    )
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "[]"
