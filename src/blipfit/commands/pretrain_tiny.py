"""`blipfit pretrain-tiny`: make the embedded miniatures again, from nothing."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from rich.table import Table

from blipfit.data.icons import SUBTASKS
from blipfit.errors import UserError
from blipfit.model.tiny import Family


def run(folder: Path, families: str) -> dict[str, Any]:
    """Make the miniatures of these families (comma-separated), and return the measurements of each.

    Raises UserError if a family is unknown.
    """
    from blipfit.pretraining.make_miniatures import pretrain_tiny
    from blipfit.pretraining.recipe import RECIPE

    names: list[Family] = [name for name in get_args(Family) if name in families.split(",")]
    if unknown := [name for name in families.split(",") if name not in get_args(Family)]:
        raise UserError(f"there is no family '{unknown[0]}'; choose {', '.join(get_args(Family))}")
    measured = pretrain_tiny(folder, families=names, listener=_print_progress)
    return {"recipe": RECIPE.hash(), "folder": str(folder), "measured": measured}


def _print_progress(record: Mapping[str, Any]) -> None:
    """One line per record, on stderr."""
    values = "  ".join(f"{name} {value}" for name, value in record.items() if name != "by_skill")
    print(values, file=sys.stderr, flush=True)


def render(record: Mapping[str, Any]) -> Table:
    """Accuracies on new images in percent, and MME scores; one column per family."""
    table = Table(title=f"miniatures in {record['folder']} (recipe {record['recipe']})", title_justify="left")
    table.add_column("on new images")
    measured = record["measured"]
    for family in measured:
        table.add_column(family, justify="right")
    for name in ("chance", "ranked", "generated", "blank", "swapped", "held_out", "held_out_chance"):
        table.add_row(name.replace("_", " "), *(f"{100 * of[name]:.1f} %" for of in measured.values()))
    for subtask in SUBTASKS:
        table.add_row(f"MME {subtask}, of 200", *(f"{of['mme'][subtask]:.1f}" for of in measured.values()))
    return table
