"""Timing two sides of a comparison fairly, and keeping what was measured."""

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

RESULTS = Path(__file__).parent / "results"
# A family's sixteen experiments with LoRA begin here.
LORA = (("t5", 13), ("vicuna", 45))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KIND = "gpu" if torch.cuda.is_available() else "cpu"


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(action: Callable[[], object]) -> float:
    wait()
    started = time.perf_counter()
    action()
    wait()
    return time.perf_counter() - started


def alternately(
    sides: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], float] = seconds
) -> dict[str, list[float]]:
    """Run every side once to warm up, then all of them in turn, `rounds` times; seconds by side."""
    for action in sides.values():
        action()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, action in sides.items():
            taken[name].append(clock(action))
    return taken


class Apart:
    """Actions in a process of their own, so that one side's settings and leftovers do not help or hinder another's.

    `build(*arguments)` is called there and returns the actions; here each action runs its own there and returns the
    seconds that it took.
    """

    def __init__(self, build: Callable[..., Mapping[str, Callable[[], object]]], *arguments: Any):
        processes = multiprocessing.get_context("spawn")
        self._pipe, there = processes.Pipe()
        self._process = processes.Process(target=_serve, args=(there, build, arguments), daemon=True)
        self._process.start()
        there.close()  # the other end's death is noticed then
        self.actions = {name: functools.partial(self._ask, name) for name in self._pipe.recv()}

    def _ask(self, name: str) -> float:
        self._pipe.send(name)
        return self._pipe.recv()  # type: ignore[no-any-return]

    def __enter__(self) -> "Apart":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.join()


def _serve(pipe: Any, build: Callable[..., Mapping[str, Callable[[], object]]], arguments: Any) -> None:
    actions = build(*arguments)
    pipe.send(list(actions))
    while True:
        try:
            name = pipe.recv()
        except EOFError:
            return
        pipe.send(seconds(actions[name]))


def ratio(slow: list[float], fast: list[float]) -> dict[str, float]:
    """How many times faster, round by round: median, least and most."""
    each = [a / b for a, b in zip(slow, fast, strict=True)]
    return {"median": statistics.median(each), "min": min(each), "max": max(each)}


def told(found: Mapping[str, float]) -> str:
    return f"{found['median']:.2f}× [{found['min']:.2f}–{found['max']:.2f}]"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    facts: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft", "accelerate")},
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def tell_shares(found: Mapping[str, Any]) -> None:
    """Print the median of every side of `seconds_each`: of a step, or where it judges of a question."""
    for name, times in found["seconds_each"].items():
        unit, what = (found["judged"], "question") if name.endswith("ranking") else (found["steps"], "step")
        print(f"  {name:18} {1000 * statistics.median(times) / unit:8.1f} ms a {what}")


def keep(name: str, record: Mapping[str, Any]) -> Path:
    """Write the raw numbers with date and machine; returns the file."""
    now = datetime.now(UTC)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{now:%Y-%m-%d}-{name}.json"
    path.write_text(
        json.dumps({"name": name, "date": now.isoformat(), "machine": machine(), **record}, indent=1) + "\n"
    )
    print(f"raw numbers: benchmarks/results/{path.name}", flush=True)
    return path


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
