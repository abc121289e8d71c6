"""What the tests of engines share: a small sweep as a command, and its results without times."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit.data import icons

IDS = "13,14,15,16"
SETTINGS = ("training.max_epochs=2", "training.batch_size=4", "training.accumulation=1")


def draw(folder: Path, train: int = 48) -> Path:
    """A small data set."""
    icons.prepare(folder, train=train, val=8, test=8)
    return folder


def sweep(data: Path, results: Path, *options: str) -> list[str]:
    """The command of a sweep of four experiments, one per unit, that saves after every second step."""
    command = [sys.executable, "-m", "blipfit", "sweep", "icons", IDS, "--model", "tiny", "--device", "cpu"]
    command += [argument for setting in SETTINGS for argument in ("--set", setting)]
    return [*command, "--data", str(data), "--results", str(results), "--bank", "1", "--save-every", "2", *options]


def run(command: list[str], environment: Mapping[str, str], seconds: float = 900) -> str:
    """Run a command; returns its stdout. What goes wrong is in the assertion."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=seconds)
    assert ended.returncode == 0, f"{ended.returncode}\n{ended.stdout[-3000:]}\n{ended.stderr[-3000:]}"
    return ended.stdout


def contents(results: Path) -> dict[str, Any]:
    """Everything that the four experiments have left, by file, without times; the adapter as bytes."""
    files: dict[str, Any] = {}
    for path in sorted((results / "icons").rglob("*")):
        name = str(path.relative_to(results))
        if path.is_dir():
            files[name] = "folder"
        elif path.suffix == ".json":
            files[name] = _timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            files[name] = [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            content = path.read_bytes()  # an 8-byte length, a JSON header whose keys have no order, the tensors
            files[name] = content[8 + int.from_bytes(content[:8], "little") :].hex()
        else:
            files[name] = path.read_text()
    return files


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if key not in ("seconds", "versions")}
    return [_timeless(item) for item in value] if isinstance(value, list) else value
