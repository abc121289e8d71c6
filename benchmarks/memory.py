"""Whether the plan's memory is what training takes: `python -m benchmarks memory`.

Every bank trains in a process of its own, because a process's peak never falls again. Measured is how far its resident
memory (on a GPU: the allocator's) rises above the loaded model; predicted, what the plan says a bank needs beyond the
weights.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.growth import spread
from blipfit.data import encoded_split, icons
from blipfit.model import loading
from blipfit.model.cost import weight_bytes
from blipfit.model.image_features import ImageFeatures
from blipfit.runtime import memory
from blipfit.training import plan, trial
from blipfit.training.step import Stepper

STEPS = 20
SIZES = (1, 2, 4, 8, 16)


def run() -> dict[str, Any]:
    """Predicted and measured bytes for banks of growing size of both families."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=16, test=16)
        for family, first in measure.LORA:
            print(f"\n{family} miniature: memory beyond the loaded model, MiB")
            found[family] = {}
            for size in SIZES:
                row = {what: _apart(what, data, first, size) for what in ("measured", "predicted")}
                found[family][str(size)] = row
                print(
                    f"  {size:>3} at once  predicted {row['predicted'] / 2**20:7.1f}  measured "
                    f"{row['measured'] / 2**20:7.1f}  ratio {row['predicted'] / row['measured']:.2f}",
                    flush=True,
                )
    measure.keep(f"memory-{measure.KIND}", found)
    return found


def _apart(what: str, data: Path, first: int, size: int) -> int:
    """`one` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.memory", what, str(data), str(first), str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def one(what: str, data: Path, first: int, size: int) -> int:
    """Bytes beyond the loaded model: `measured` in training, or `predicted` by the plan's trial."""
    recipes = spread(first, size)
    backbone = loading.load(recipes[0].model, device=measure.DEVICE)
    train = encoded_split.load(backbone.text, recipes[0].data, data, "train")
    image_features = ImageFeatures.from_backbone(backbone, "off")
    if what == "predicted":
        told = trial.measure(backbone, recipes, train, image_features)
        assert told is not None
        return told.memory - sum(weight_bytes(backbone.hf).values())
    training = recipes[0].training
    batches = plan.effective_batches(train.lengths, training, 0)[:STEPS]
    before = torch.cuda.memory_allocated() if measure.DEVICE == "cuda" else memory.forget_peak()
    if not before:
        raise SystemExit("only Linux tells how much memory a process took")
    stepper = Stepper(backbone, recipes, train.encoded)
    best = stepper.bank.values.clone()  # as training has it
    stepper.train_mode()
    for number, batch in enumerate(batches):
        micros = plan.micro_batches(batch, training)
        stepper.step(
            batch, [image_features.features([train.questions[i] for i in micro]) for micro in micros], 0, number
        )
    peak = torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else memory.peak()
    del best
    return peak - before


if __name__ == "__main__":
    print(one(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
