"""`blipfit pretrain-tiny`: what the miniatures' making prints."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from blipfit.data.icons import SUBTASKS
from blipfit.errors import UserError
from blipfit.model.tiny import Family


def pretrain(folder: Path, families: str) -> dict[str, Any]:
    """Run the recipe for these families (a comma between) and return each one's measurements by name."""
    from blipfit.pretraining import miniatures as pretrain

    names: list[Family] = [name for name in get_args(Family) if name in families.split(",")]
    if unknown := [name for name in families.split(",") if name not in get_args(Family)]:
        raise UserError(f"there is no family '{unknown[0]}'; choose {', '.join(get_args(Family))}")
    measured = pretrain.pretrain_tiny(folder, families=names, listen=_tell)
    return {"recipe": pretrain.RECIPE.hash(), "folder": str(folder), "measured": measured}


def _tell(record: Mapping[str, Any]) -> None:
    """One line a record, on stderr."""
    values = "  ".join(f"{name} {value}" for name, value in record.items() if name != "by_skill")
    print(values, file=sys.stderr, flush=True)


def table(record: Mapping[str, Any]) -> Table:
    """Accuracies on fresh pictures, in per cent, and MME's scores, one column a family."""
    drawn = Table(title=f"miniatures in {record['folder']} (recipe {record['recipe']})", title_justify="left")
    drawn.add_column("on fresh pictures")
    measured = record["measured"]
    for family in measured:
        drawn.add_column(family, justify="right")
    for name in ("chance", "ranked", "generated", "blank", "swapped", "held_out", "held_out_chance"):
        drawn.add_row(name.replace("_", " "), *(f"{100 * of[name]:.1f} %" for of in measured.values()))
    for subtask in SUBTASKS:
        drawn.add_row(f"MME {subtask}, of 200", *(f"{of['mme'][subtask]:.1f}" for of in measured.values()))
    return drawn
