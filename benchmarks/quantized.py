"""Measures the accuracy that a quantized language model costs: `python -m benchmarks.quantized`.

Trains the same experiment (LoRA in Q-Former and language model) with the language model in full precision, 8 bit and
4 bit, on the skills that are not in the miniatures' pre-training.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks import measure
from blipfit import data as blipfit_data
from blipfit import grid
from blipfit.commands import demo as demonstration
from blipfit.model import cost, loading
from blipfit.report import terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.training.loop import train

EXPERIMENTS = ("32", "64")
QUANTIZATIONS = ("none", "8bit", "4bit")


def run(root: Path) -> dict[str, Any]:
    """Train the runs that are not finished in `root` yet; writes and returns all results."""
    data = root / "data"
    blipfit_data.prepare("icons", data, **demonstration.SIZES, seed=42)
    record: dict[str, Any] = {"sizes": demonstration.SIZES, "overrides": list(demonstration.OVERRIDES)}
    for name in EXPERIMENTS:
        for quantization in QUANTIZATIONS:
            overrides = (*demonstration.OVERRIDES, f"model.quantization={quantization}")
            recipe = grid.recipe("icons", name, "tiny").override(overrides)
            (run,) = train([recipe], data, root / quantization, listener=TrainingDisplay())
            result = run.result()
            language_model_bytes = sum(cost.weight_bytes(loading.load(recipe.model).hf.language_model).values())
            record[f"{name} {quantization}"] = {
                "test": result["metrics"]["test"],
                "seconds": result["seconds"],
                "language_model_bytes": language_model_bytes,
            }
            accuracy = terminal.format_accuracy(result["metrics"]["test"])
            print(f"{name} {quantization:5} {accuracy} {language_model_bytes:,} bytes", flush=True)
    measure.write_results("quantized", record)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=Path("results/quantized"), help="data and runs")
    run(parser.parse_args().root)


if __name__ == "__main__":
    main()
