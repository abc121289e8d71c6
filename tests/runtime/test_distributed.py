"""Two processes over one batch give what one gives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blipfit.data import icons

ARGUMENTS = ["train", "icons", "13", "45", "--model", "tiny", "--set", "training.max_epochs=1", "--set"]
ARGUMENTS += ["training.dropout=false", "--device", "cpu", "--json"]


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    icons.prepare(tmp_path / "data", train=32, val=10, test=10)
    found = {}
    for name, launcher in (
        ("one", [sys.executable, "-m", "blipfit.cli"]),
        (
            "two",
            [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "blipfit.cli"],
        ),
    ):
        folders = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / name)]
        ended = subprocess.run([*launcher, *ARGUMENTS, *folders], capture_output=True, text=True, check=False)
        assert ended.returncode == 0, ended.stderr
        found[name] = json.loads(ended.stdout)["results"]
        assert sorted(p.name for p in (tmp_path / name / "icons").iterdir()) == ["13", "45"]
    for one, two in zip(found["one"], found["two"], strict=True):
        assert one["metrics"] == two["metrics"]
        assert two["history"][0]["loss"] == pytest.approx(one["history"][0]["loss"], rel=1e-5)
