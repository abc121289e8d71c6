"""Two processes over a batch compute the same as a single process."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.runtime import distributed

ARGUMENTS = ["train", "icons", "13", "45", "--model", "tiny", "--set", "training.max_epochs=1", "--set"]
ARGUMENTS += ["training.dropout=false", "--device", "cpu", "--json"]


@pytest.mark.slow
def test_two_processes_equal_a_single_process(tmp_path: Path) -> None:
    icons.prepare(tmp_path / "data", train=32, val=10, test=10)
    results = {}
    for name, launcher in (
        ("single", [sys.executable, "-m", "blipfit"]),
        (
            "double",
            [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "-m", "blipfit"],
        ),
    ):
        folders = ["--data", str(tmp_path / "data"), "--results", str(tmp_path / name)]
        process = subprocess.run([*launcher, *ARGUMENTS, *folders], capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        results[name] = json.loads(process.stdout)["results"]
        assert sorted(p.name for p in (tmp_path / name / "icons").iterdir()) == ["13", "45"]
    for single, double in zip(results["single"], results["double"], strict=True):
        assert single["metrics"] == double["metrics"]
        assert double["history"][0]["loss"] == pytest.approx(single["history"][0]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "name", ["mps", "xpu", "meta", "cuda:99", "cpu:3", "vulkan", "hpu", "", "gpu", "cuda:x", "a\0b", 3.5]
)
def test_a_device_that_is_not_here_is_one_sentence(name) -> None:
    with pytest.raises(UserError, match="--device") as error:
        distributed.select_device(name)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", ["cpu", "cpu:0", torch.device("cpu")])
def test_the_cpu_is_always_here(name) -> None:
    assert distributed.select_device(name).type == "cpu"
