"""The published grid as a table: placements × ranks, per data set and family, the published numbers beside ours."""

from collections.abc import Sequence
from dataclasses import dataclass

from blipfit import grid
from blipfit.recipe import Family
from blipfit.report import published, terminal
from blipfit.report.experiments import Collection, Experiment
from blipfit.report.numbers import Number

RULE = (
    "A difference is marked (▲ higher, ▼ lower) if the published value is outside our 95 % confidence interval. The "
    "interval accounts for the sample of test questions, not for the seed: over the four ranks of a row the published "
    "values vary by about ±1 point (standard deviation), and each was measured with one seed."
)
FAMILIES: dict[Family, str] = {"t5": "Flan-T5", "vicuna": "Vicuna"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """An experiment beside the published number of the same name."""

    experiment: Experiment
    score: Number | None
    interval: tuple[Number, Number] | None
    published: Number | None
    difference: Number | None
    """None if there is no published number, or if it was measured with another model or on other questions."""
    mark: str
    """`▲` or `▼` if the published value is outside the interval, else empty."""
    other_settings: Sequence[str]
    """Fields that differ from the grid's recipe, if there is a difference to explain."""

    @classmethod
    def of(cls, experiment: Experiment) -> "Comparison":
        score, interval, reference = experiment.score(), experiment.interval(), experiment.published()
        difference, mark = None, ""
        if score and reference and experiment.is_comparable():
            difference = score.minus(reference)
            if interval and not interval[0].value <= reference.value <= interval[1].value:
                mark = "▲" if difference.shown_value > 0 else "▼"
        settings = experiment.other_settings() if difference else []
        return cls(experiment, score, interval, reference, difference, mark, settings)


@dataclass(frozen=True, slots=True)
class Cell:
    """One placement and rank."""

    number: int
    """The experiment's number in the grid."""
    comparison: Comparison | None
    """None if the experiment is not finished."""
    published: Number | None


@dataclass(frozen=True, slots=True)
class GridTable:
    """The grid of one data set and family."""

    collection: Collection
    family: Family
    rows: Sequence[tuple[str, Sequence[Cell]]]
    """Placement and its cells, one per rank."""

    @property
    def title(self) -> str:
        """Data set and family."""
        return f"{self.collection.title}, {FAMILIES[self.family]}"

    @property
    def key(self) -> str:
        """Unique in a report."""
        return f"{self.collection.key}-{self.family}"

    @property
    def comparisons(self) -> list[Comparison]:
        """Of all finished experiments in the table."""
        return [cell.comparison for _, cells in self.rows for cell in cells if cell.comparison]

    @property
    def has_published(self) -> bool:
        """Whether there are published numbers for this data set."""
        return any(cell.published for _, cells in self.rows for cell in cells)


def make_tables(collections: Sequence[Collection]) -> list[GridTable]:
    """One table per data set and family with at least one finished experiment of the grid."""
    tables = [_make_table(collection, family) for collection in collections for family in FAMILIES]
    return [table for table in tables if table.comparisons]


def _make_table(collection: Collection, family: Family) -> GridTable:
    by_name = {experiment.name: experiment for experiment in collection.finished}
    first = 1 if family == "t5" else 1 + len(grid.IDS) // 2
    rows = []
    for index, row in enumerate(grid.PLACEMENTS):
        cells = []
        for column, rank in enumerate(grid.RANKS):
            number = first + index * len(grid.RANKS) + column
            experiment = by_name.get(str(number))
            comparison = None if experiment is None else Comparison.of(experiment)
            cells.append(Cell(number, comparison, published.grid_accuracy(collection.dataset, family, index, rank)))
        placement = terminal.format_placement({"qformer": row.qformer, "llm": row.llm})
        rows.append((placement, cells))
    return GridTable(collection, family, rows)


def other_comparisons(collections: Sequence[Collection]) -> list[Comparison]:
    """Finished experiments that are not in the grid: baselines, explorations, experiments with names of their own."""
    return [
        Comparison.of(experiment)
        for collection in collections
        for experiment in collection.finished
        if not published.is_in_grid(experiment.name)
    ]
