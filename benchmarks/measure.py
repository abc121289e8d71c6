"""Times the sides of a comparison in turn, and writes the results with date and machine to benchmarks/results."""

import functools
import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from blipfit.recipe import Family

RESULTS = Path(__file__).parent / "results"
FIRST_LORA: tuple[tuple[Family, int], ...] = (("t5", 13), ("vicuna", 45))
"""For each family the id of the first of its sixteen experiments with LoRA in the Q-Former."""
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MACHINE_KIND = "gpu" if torch.cuda.is_available() else "cpu"
"""Part of the names of result files."""


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished all its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def time_once(action: Callable[[], object]) -> float:
    """Run an action once and return the seconds that it takes, including its work on a GPU."""
    synchronize()
    started = time.perf_counter()
    action()
    synchronize()
    return time.perf_counter() - started


def time_alternately(
    sides: Mapping[str, Callable[[], Any]], rounds: int, timer: Callable[[Callable[[], Any]], float] = time_once
) -> dict[str, list[float]]:
    """Run every side once to warm up, then time all of them in turn, `rounds` times.

    Returns the seconds of each round by side. `timer` runs an action and returns its seconds.
    """
    for action in sides.values():
        action()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, action in sides.items():
            times[name].append(timer(action))
    return times


class ActionProcess:
    """A process that runs the actions of one side, so that its settings and memory do not change another side's time.

    `build(*arguments)` is called in that process and returns its actions. Each function in `actions` runs the action of
    the same name there and returns the seconds that it took.
    """

    def __init__(self, build: Callable[..., Mapping[str, Callable[[], object]]], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=_serve_actions, args=(child_pipe, build, arguments), daemon=True)
        self._process.start()
        child_pipe.close()  # otherwise recv() would wait forever if the process ends
        self.actions = {name: functools.partial(self._run, name) for name in self._pipe.recv()}

    def _run(self, name: str) -> float:
        self._pipe.send(name)
        return self._pipe.recv()  # type: ignore[no-any-return]

    def __enter__(self) -> "ActionProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve_actions(pipe: Any, build: Callable[..., Mapping[str, Callable[[], object]]], arguments: Any) -> None:
    actions = build(*arguments)
    pipe.send(list(actions))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(time_once(actions[name]))


def compute_speedup(slow: list[float], fast: list[float]) -> dict[str, float]:
    """Return how many times faster `fast` is, round by round: median, minimum and maximum."""
    ratios = [slow_seconds / fast_seconds for slow_seconds, fast_seconds in zip(slow, fast, strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def format_speedup(speedup: Mapping[str, float]) -> str:
    """Format a result of `compute_speedup`: `2.10× [2.05–2.20]`."""
    return f"{speedup['median']:.2f}× [{speedup['min']:.2f}–{speedup['max']:.2f}]"


def describe_machine() -> dict[str, Any]:
    """Return processor, GPU, threads, load and package versions, for the result file."""
    description: dict[str, Any] = {
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }
    if torch.cuda.is_available():
        description["gpu"] = torch.cuda.get_device_name()
    return description


def print_unit_times(results: Mapping[str, Any]) -> None:
    """Print the median time of every side in `results["seconds_each"]`, per step, or per question if it ranks."""
    for name, times in results["seconds_each"].items():
        count, unit = (results["judged"], "question") if name.endswith("ranking") else (results["steps"], "step")
        print(f"  {name:18} {1000 * statistics.median(times) / count:8.1f} ms per {unit}")


def write_results(name: str, results: Mapping[str, Any]) -> Path:
    """Write raw results with date and machine to `benchmarks/results/DATE-NAME.json`; returns the file."""
    now = datetime.now(UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(
        json.dumps({"name": name, "date": now.isoformat(), "machine": describe_machine(), **results}, indent=1) + "\n"
    )
    print(f"raw numbers: benchmarks/results/{path.name}", flush=True)
    return path


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
