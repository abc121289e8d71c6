"""Many experiments in one process: resident memory and open files do not grow with their number."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from blipfit import data

EXPERIMENTS, BANK = 500, 4
MEASURED_AFTER = 100
CODE = """
import gc, json, os, sys
from pathlib import Path

import torch

from blipfit import grid
from blipfit.training.loop import train
from blipfit.training.model_cache import ModelCache

torch.set_num_threads(1)
data, results, count, bank = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
options = ["training.max_epochs=1", "training.batch_size=4", "data.limit=4"]
# Experiments of several placements and ranks, and one in five alone, as at the end of a sweep.
names = ["13", "20", "28", "32", "3"]
model_cache = ModelCache("cpu")
finished, number = 0, 0
while finished < count:
    size = 1 if number % 5 == 4 else min(bank, count - finished)
    recipes = [
        grid.recipe("icons", names[(number + k) % len(names)], "tiny")
        .override([*options, f"training.seed={finished + k}"])
        .model_copy(update={"experiment": f"run-{finished + k}"})
        for k in range(size)
    ]
    train(recipes, data, results, model_cache=model_cache)
    finished, number = finished + size, number + 1
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files = len(os.listdir("/proc/self/fd"))
    line = {"finished": finished, "mib": pages * os.sysconf("SC_PAGE_SIZE") / 2**20, "files": files}
    line |= {"objects": len(gc.get_objects()), "threads": len(os.listdir("/proc/self/task"))}
    print(json.dumps(line), flush=True)
"""


@pytest.mark.slow
def test_memory_and_open_files_are_level(tmp_path: Path):
    if not Path("/proc/self/statm").exists():
        pytest.skip("resident memory is read from /proc")
    data.prepare("icons", tmp_path / "icons", train=4, val=4, test=4)
    arguments = [str(tmp_path / "icons"), str(tmp_path / "results"), str(EXPERIMENTS), str(BANK)]
    output = subprocess.run([sys.executable, "-c", CODE, *arguments], capture_output=True, text=True)
    assert output.returncode == 0, output.stderr
    lines = [json.loads(line) for line in output.stdout.splitlines()]
    early, late = next(line for line in lines if line["finished"] >= MEASURED_AFTER), lines[-1]
    print(early, late)
    assert late["finished"] == EXPERIMENTS
    assert late["files"] == early["files"]
    assert late["threads"] == early["threads"]
    assert late["mib"] < early["mib"] * 1.05
