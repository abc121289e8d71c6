"""Measures the time of a bank's step by operation, on a CPU: `python -m benchmarks.step_profile`.

Operations are timed as autograd calls them; on a CPU they have finished when they return. torch's profiler is not used,
because it takes so much memory that the steps wait for new pages, which they do not do otherwise.
"""

import collections
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bank, measure
from benchmarks.growth import select_recipes
from blipfit.data import encoded_split, icons
from blipfit.model import loading
from blipfit.model.image_features import ImageFeatures

EXPERIMENTS, STEPS = 16, 20


class Operations(TorchDispatchMode):
    """Counts the seconds and the calls of every operation inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = collections.defaultdict(float)
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        started = time.perf_counter()
        result = operation(*args, **(kwargs or {}))
        self.seconds[str(operation)] += time.perf_counter() - started
        self.calls[str(operation)] += 1
        return result


def run() -> dict[str, Any]:
    """Measure both families; writes and returns milliseconds and calls per step of the bank, by operation."""
    results: dict[str, Any] = {"experiments": EXPERIMENTS, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=16, test=16)
        for family, first in measure.FIRST_LORA:
            recipes = select_recipes(first, EXPERIMENTS)
            backbone = loading.load(recipes[0].model, device="cpu")
            train = encoded_split.load(backbone.text, recipes[0].data, data, "train")
            image_features = ImageFeatures.from_backbone(backbone, "stored", Path(folder) / "store")
            image_features.prepare(train.questions)
            steps = functools.partial(bank.train, backbone, recipes, train, image_features, STEPS)
            steps()
            seconds = measure.time_once(steps)
            with Operations() as operations:
                steps()
            results[family] = {
                "ms_a_step": 1000 * seconds / STEPS,
                "operations": {
                    name: {"ms": 1000 * total / STEPS, "calls": operations.calls[name] / STEPS}
                    for name, total in sorted(operations.seconds.items(), key=lambda item: -item[1])
                },
            }
            _print_family(family, results[family])
    measure.write_results("step-profile-cpu", results)
    return results


def _print_family(family: str, results: dict[str, Any]) -> None:
    operations_ms = sum(row["ms"] for row in results["operations"].values())
    print(f"\n{family}: {results['ms_a_step']:.0f} ms per step; sum of its timed operations {operations_ms:.0f} ms")
    for name, row in list(results["operations"].items())[:20]:
        print(f"  {row['ms']:7.1f} ms {row['calls']:6.0f} × {name}", flush=True)


if __name__ == "__main__":
    run()
