"""Published results, with their source (`published.json`)."""

from functools import cache
from pathlib import Path

from blipfit import grid, run_folder
from blipfit.recipe import Family
from blipfit.report.numbers import Number, Record

_FILE = Path(__file__).with_name("published.json")


@cache
def record() -> Record:
    """All published numbers that a report compares with."""
    return Record(_FILE.name, run_folder.read_json(_FILE))


def accuracy(dataset: str, experiment: str) -> Number | None:
    """The published test accuracy of an experiment of the grid or a baseline, in percent; None if there is none."""
    if experiment in grid.BASELINES:
        return record().number("baseline", dataset, grid.BASELINES[experiment], digits=2)
    if not is_in_grid(experiment):
        return None
    family, row, rank = grid.decode_id(int(experiment))
    return grid_accuracy(dataset, family, grid.PLACEMENTS.index(row), rank)


def grid_accuracy(dataset: str, family: Family, row: int, rank: int) -> Number | None:
    """The published test accuracy of a placement (its row in the grid) and rank, in percent; None if there is none."""
    return record().number("accuracy", dataset, family, row, grid.RANKS.index(rank), digits=2)


def is_in_grid(experiment: str) -> bool:
    """Whether the name is that of one of the 64 experiments."""
    return experiment in _GRID_NAMES


_GRID_NAMES = frozenset(map(str, grid.IDS))
