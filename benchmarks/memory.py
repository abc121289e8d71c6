"""Compares the memory that training takes with the memory that is planned for it: `python -m benchmarks memory`.

Every bank trains in a process of its own, because the peak memory of a process never falls. "Measured" is the rise of
its resident memory (on a GPU: of the allocated memory) above that of the loaded model; "predicted" is the planned
memory of the bank beyond the weights.
"""

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import measure
from benchmarks.growth import select_recipes
from blipfit.data import encoded_split, icons
from blipfit.model import loading
from blipfit.model.cost import weight_bytes
from blipfit.model.image_features import ImageFeatures
from blipfit.runtime import cpu_memory
from blipfit.training import bank_trials, batch_order
from blipfit.training.step import Stepper

STEPS = 20
SIZES = (1, 2, 4, 8, 16)


def run() -> dict[str, Any]:
    """Measure both families; writes and returns predicted and measured bytes for banks of several sizes."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=16 * STEPS, val=16, test=16)
        for family, first in measure.FIRST_LORA:
            print(f"\n{family} miniature: memory beyond the loaded model, MiB")
            results[family] = {}
            for size in SIZES:
                row = {kind: _run_process(kind, data, first, size) for kind in ("measured", "predicted")}
                results[family][str(size)] = row
                print(
                    f"  {size:>3} experiments  predicted {row['predicted'] / 2**20:7.1f}  measured "
                    f"{row['measured'] / 2**20:7.1f}  ratio {row['predicted'] / row['measured']:.2f}",
                    flush=True,
                )
    measure.write_results(f"memory-{measure.MACHINE_KIND}", results)
    return results


def _run_process(kind: str, data: Path, first: int, size: int) -> int:
    """Call `measure_bytes` in a new process."""
    command = [sys.executable, "-m", "benchmarks.memory", kind, str(data), str(first), str(size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure_bytes(kind: str, data: Path, first: int, size: int) -> int:
    """Return the bytes of a bank beyond the loaded model: `kind` is "measured" or "predicted"."""
    recipes = select_recipes(first, size)
    backbone = loading.load(recipes[0].model, device=measure.DEVICE)
    train = encoded_split.load(backbone.text, recipes[0].data, data, "train")
    image_features = ImageFeatures.from_backbone(backbone, "off")
    if kind == "predicted":
        result = bank_trials.measure(backbone, recipes, train, image_features)
        assert result is not None
        return result.memory - sum(weight_bytes(backbone.hf).values())
    training = recipes[0].training
    batches = batch_order.effective_batches(train.lengths, training, 0)[:STEPS]
    before = torch.cuda.memory_allocated() if measure.DEVICE == "cuda" else cpu_memory.reset_peak()
    if not before:
        raise SystemExit("this benchmark needs Linux, which reports the peak memory of a process, or a GPU")
    stepper = Stepper(backbone, recipes, train.encoded)
    best = stepper.bank.values.clone()  # training stores the best values, too
    stepper.train_mode()
    for number, batch in enumerate(batches):
        micros = batch_order.micro_batches(batch, training)
        stepper.step(
            batch, [image_features.features([train.questions[i] for i in micro]) for micro in micros], 0, number
        )
    peak = torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else cpu_memory.peak_bytes()
    del best
    return peak - before


if __name__ == "__main__":
    print(measure_bytes(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])))
