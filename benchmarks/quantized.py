"""What a quantized language model costs in accuracy: `python -m benchmarks.quantized`.

The same experiment (LoRA in Q-Former and language model) on the skills that the miniature was never taught, above a
language model in full precision, 8 bit and 4 bit.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import measure
from blipfit import data as datasets
from blipfit import grid
from blipfit.commands import demo as demonstration
from blipfit.model import cost, loading
from blipfit.report import terminal
from blipfit.training.loop import train

EXPERIMENTS = ("32", "64")
HOW = ("none", "8bit", "4bit")


def run(root: Path) -> dict[str, Any]:
    """Train what is not finished in `root` yet; returns and keeps everything."""
    data = root / "data"
    datasets.prepare("icons", data, **demonstration.SIZES, seed=42)
    record: dict[str, Any] = {"sizes": demonstration.SIZES, "overrides": list(demonstration.OVERRIDES)}
    for name in EXPERIMENTS:
        for how in HOW:
            own = (*demonstration.OVERRIDES, f"model.quantization={how}")
            recipe = grid.recipe("icons", name, "tiny").override(own)
            (one,) = train([recipe], data, root / how, listen=terminal.TrainingDisplay())
            result = one.result()
            stored = sum(cost.weight_bytes(loading.load(recipe.model).hf.language_model).values())
            record[f"{name} {how}"] = {
                "test": result["metrics"]["test"],
                "seconds": result["seconds"],
                "language_model_bytes": stored,
            }
            print(f"{name} {how:5} {terminal.percent(result['metrics']['test'])} {stored:,} bytes", flush=True)
    measure.keep("quantized", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("results/quantized"), help="data and runs")
    run(parser.parse_args().root)


if __name__ == "__main__":
    main()
