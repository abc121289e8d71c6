"""The record of `benchmarks.gpu`: results by name, such as `t5/banks/8`, written to a file after every measurement."""

import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure


class Record:
    """All results so far, within a time limit."""

    def __init__(self, path: Path, minutes: float, scale: str):
        self.path, self.deadline = path, time.monotonic() + 60 * minutes
        self.entries: dict[str, Any] = {
            "name": "gpu",
            "scale": scale,
            "machine": measure.describe_machine(),
            "skipped": [],
            "failed": {},
        }

    def seconds_left(self) -> float:
        """Return the seconds until the time limit."""
        return self.deadline - time.monotonic()

    def add(self, name: str, estimate: float, action: Callable[[], Any]) -> Any:
        """Run an action and record its result under `name`, with `/` between the levels.

        `estimate` is the number of seconds that it will take. Returns the result, or None if the action failed or
        was skipped because less time is left.
        """
        if self.seconds_left() < estimate:
            self.entries["skipped"].append(name)
            print(f"{name}: skipped, {self.seconds_left():.0f} s left", flush=True)
            self.write()
            return None
        started = time.monotonic()
        try:
            result = action()
        except torch.OutOfMemoryError as error:
            result = {"out_of_memory": str(error).splitlines()[0]}
        except Exception as error:  # the other measurements must go on
            self.entries["failed"][name] = f"{type(error).__name__}: {error}".splitlines()[0][:500]
            print(f"{name}: FAILED {type(error).__name__}: {str(error)[:600]}", flush=True)
            result = None
        if result is not None:
            level = self.entries
            *sections, last = name.split("/")
            for section in sections:
                level = level.setdefault(section, {})
            level[last] = result
            print(f"{name}: {_format_result(result)}   [{time.monotonic() - started:.1f} s]", flush=True)
        self.write()
        free_memory()
        return result

    def write(self) -> None:
        """Write all results to the file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.entries, indent=1) + "\n", encoding="utf-8")


def free_memory() -> None:
    """Free the memory of models that are no longer used."""
    gc.collect()  # accelerate stores a model's forward in the model, a reference cycle that only the collector frees
    if measure.DEVICE == "cuda":
        torch.cuda.empty_cache()


def _format_result(result: Any) -> str:
    if not isinstance(result, dict):
        return f"{result:.4g}" if isinstance(result, float) else str(result)
    texts = []
    for key, value in result.items():
        if key.endswith("bytes") and value is not None:
            texts.append(f"{key} {value / 1e9:.1f} GB")
        elif isinstance(value, float):
            texts.append(f"{key} {value:.4g}")
        elif not isinstance(value, list):
            texts.append(f"{key} {value}")
    return ", ".join(texts)
