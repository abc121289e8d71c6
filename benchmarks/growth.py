"""How cost grows: experiments in a bank, candidates, text length. Time and planned memory beside each other."""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks import measure
from blipfit import grid
from blipfit.data import icons
from blipfit.evaluation import material
from blipfit.model import loading
from blipfit.model.sight import Sight
from blipfit.recipe import Recipe
from blipfit.training import trial

SIZES = (1, 2, 4, 8, 16)


def run(rounds: int = 3) -> dict[str, Any]:
    """Seconds a step and an experiment, and bytes, for banks of growing size of both families."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=128, val=16, test=16)
        for family, first in measure.LORA:
            found[family] = _family(first, data, rounds)
            print(f"\n{family} miniature: an experiment's share of a step, memory of the bank's training")
            for size, row in found[family].items():
                times = row["seconds_each"]
                print(
                    f"  {size:>3} at once  {1000 * sorted(times)[len(times) // 2]:7.1f} ms "
                    f"[{1000 * min(times):.1f}–{1000 * max(times):.1f}]  {row['bytes'] / 2**20:8.1f} MiB",
                    flush=True,
                )
    measure.keep(f"growth-{measure.KIND}", found)
    return found


def spread(first: int, size: int) -> list[Recipe]:
    """So many of a family's sixteen experiments, evenly spread."""
    return [grid.recipe("icons", first + i * max(SIZES) // size, "tiny") for i in range(size)]


def _family(first: int, data: Path, rounds: int) -> dict[str, Any]:
    backbone = loading.load(grid.recipe("icons", first, "tiny").model, device=measure.DEVICE)
    train = material.read(backbone, grid.recipe("icons", first, "tiny").data, data, "train")
    sight = Sight.from_backbone(backbone, "off")
    rows: dict[str, Any] = {str(size): {"seconds_each": [], "bytes": 0} for size in SIZES}
    for _ in range(rounds):
        for size in SIZES:
            one = trial.measure(backbone, spread(first, size), train, sight)
            assert one is not None
            rows[str(size)]["seconds_each"].append(one.seconds_each)
            rows[str(size)]["bytes"] = one.memory
    return rows
