"""Where a bank's step spends its time, by operation: `python -m benchmarks.step_profile`.

Operations are timed as autograd calls them, on a CPU, where they are done when they return. (torch's profiler keeps so
much itself that steps pay for fresh memory under it, which they do not otherwise.)
"""

import collections
import functools
import tempfile
import time
from pathlib import Path
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import bank, measure
from benchmarks.growth import spread
from blipfit.data import encoded_split, icons
from blipfit.model import loading
from blipfit.model.image_features import ImageFeatures

EXPERIMENTS, STEPS = 16, 20


class Operations(TorchDispatchMode):
    """Seconds and calls of every operation while it is open."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: collections.Counter[str] = collections.Counter()
        self.calls: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, operation: Any, types: Any, given: Any = (), named: Any = None) -> Any:
        started = time.perf_counter()
        result = operation(*given, **(named or {}))
        self.seconds[str(operation)] += time.perf_counter() - started
        self.calls[str(operation)] += 1
        return result


def run() -> dict[str, Any]:
    """Both families: milliseconds and calls a step of the bank, by operation."""
    found: dict[str, Any] = {"experiments": EXPERIMENTS, "steps": STEPS}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=16, test=16)
        for family, first in measure.LORA:
            recipes = spread(first, EXPERIMENTS)
            backbone = loading.load(recipes[0].model, device="cpu")
            train = encoded_split.load(backbone.text, recipes[0].data, data, "train")
            image_features = ImageFeatures.from_backbone(backbone, "stored", Path(folder) / "store")
            image_features.prepare(train.questions)
            steps = functools.partial(bank.train, backbone, recipes, train, image_features, STEPS)
            steps()
            whole = measure.seconds(steps)
            with Operations() as seen:
                steps()
            found[family] = {
                "ms_a_step": 1000 * whole / STEPS,
                "operations": {
                    name: {"ms": 1000 * seconds / STEPS, "calls": seen.calls[name] / STEPS}
                    for name, seconds in seen.seconds.most_common()
                },
            }
            _tell(family, found[family])
    measure.keep("step-profile-cpu", found)
    return found


def _tell(family: str, found: dict[str, Any]) -> None:
    inside = sum(row["ms"] for row in found["operations"].values())
    print(f"\n{family}: a step {found['ms_a_step']:.0f} ms; in operations, when each is timed, {inside:.0f} ms")
    for name, row in list(found["operations"].items())[:20]:
        print(f"  {row['ms']:7.1f} ms {row['calls']:6.0f} × {name}", flush=True)


if __name__ == "__main__":
    run()
