"""Data sets by name: the module that knows its files, and how it is asked. The one table of them.

A module of `blipfit.data` with `prepare` and `load`, and a line here, are all that a new data set takes.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataSet:
    """What the rest of blipfit knows of a data set."""

    name: str
    prompt: str
    """Of `blipfit.data.prompts`, by default."""
    mirrored_matters: bool = False
    """Whether a flip or a crop may change the answer, so that training sees the plain resize."""
    open: bool = False
    """Whether answers are free text, generated and compared, where others have choices to rank."""
    trains: bool = True
    """Whether the grid has recipes for it; else it only judges."""

    @property
    def module(self) -> str:
        return f"blipfit.data.{self.name}"


DATA_SETS: Mapping[str, DataSet] = {
    one.name: one
    for one in (
        DataSet("scienceqa", "scienceqa-v1"),
        DataSet("iconqa", "iconqa-v1"),
        DataSet("icons", "iconqa-v1", mirrored_matters=True),
        DataSet("own", "vqa-v1"),
        DataSet("rewardbench", "instruction-v1", mirrored_matters=True, open=True),
        DataSet("mme", "instruction-v1", trains=False),
    )
}
