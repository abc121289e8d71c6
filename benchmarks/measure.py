"""Timing two sides of a comparison fairly, and keeping what was measured."""

import json
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


def alternately(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Run every side once to warm up, then all of them in turn, `rounds` times; seconds by side."""
    for action in sides.values():
        action()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, action in sides.items():
            taken[name].append(seconds(action))
    return taken


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
