"""The table of data sets: what the rest of blipfit knows about each, by name.

A new data set takes a module in `blipfit/data/` with `prepare` and `load`, a row here, and its import in
`blipfit/data/__init__.py`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DataSet:
    """A data set's name, default prompt and kind."""

    name: str
    prompt: str
    """Its prompt by default, a name in `blipfit.data.prompts`."""
    mirrored_matters: bool = False
    """Whether a flip or a crop of the image may change the answer; if so, training uses the plain resize."""
    open: bool = False
    """Whether answers are free text, which the model generates; otherwise there are choices to rank."""
    trains: bool = True
    """Whether the grid has recipes for it; otherwise it is for evaluation only."""


_ROWS = (
    DataSet("scienceqa", "scienceqa-v1"),
    DataSet("iconqa", "iconqa-v1"),
    DataSet("icons", "iconqa-v1", mirrored_matters=True),
    DataSet("own", "vqa-v1"),
    DataSet("rewardbench", "instruction-v1", mirrored_matters=True, open=True),
    DataSet("mme", "instruction-v1", trains=False),
)
DATA_SETS: dict[str, DataSet] = {row.name: row for row in _ROWS}
