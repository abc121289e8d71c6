"""`blipfit unit FILE`: one unit of a sweep, on whatever machine an engine starts it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit.cluster.units import train_unit
from blipfit.commands import train
from blipfit.report.progress import TrainingDisplay


def run(file: Path) -> dict[str, Any]:
    """Train a unit. Raises UserError if its file, its data or a run folder cannot be used."""
    with TrainingDisplay() as display:
        return train.summarize(train_unit(file, listener=display))


def render(record: Mapping[str, Any]) -> list[Any]:
    """The results as `blipfit train` shows them."""
    return train.render(record)
