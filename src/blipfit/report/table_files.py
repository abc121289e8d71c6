"""The main table as a file: Markdown, LaTeX, CSV or JSON.

Markdown and LaTeX have the published grid (placements × ranks) and a list of the other experiments; CSV and JSON have
one row per experiment. All print the same numbers.
"""

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

from blipfit import grid
from blipfit.report import grid_table
from blipfit.report.experiments import Collection
from blipfit.report.grid_table import Cell, Comparison
from blipfit.report.numbers import Number

COLUMNS = (
    "dataset",
    "experiment",
    "model",
    "placement",
    "rank",
    "measure",
    "trained_parameters",
    "score",
    "low",
    "high",
    "chance",
    "published",
    "difference",
    "outside",
)
"""Columns of CSV and JSON; `outside` is ▲ or ▼ if the published value is outside the interval."""


def to_rows(collections: Sequence[Collection]) -> list[dict[str, Any]]:
    """One row per finished experiment, as it is in CSV and JSON; numbers are rounded as they are printed."""
    comparisons = [Comparison.of(experiment) for collection in collections for experiment in collection.finished]
    rows = []
    for comparison in comparisons:
        experiment, interval = comparison.experiment, comparison.interval
        values = (
            experiment.dataset,
            experiment.name,
            experiment.model,
            experiment.placement,
            experiment.rank,
            experiment.measure,
            _round(experiment.number("trained_parameters", digits=0)),
            _round(comparison.score),
            _round(interval[0] if interval else None),
            _round(interval[1] if interval else None),
            _round(experiment.number("metrics", "test", "chance")),
            _round(comparison.published),
            _round(comparison.difference),
            comparison.mark,
        )
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    return rows


def _round(number: Number | None) -> float | int | None:
    if number is None:
        return None
    value = round(number.shown_value, number.digits)
    return int(value) if number.digits == 0 else value


def to_csv(collections: Sequence[Collection]) -> str:
    """Comma-separated values with a header; missing values are empty."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(to_rows(collections))
    return buffer.getvalue()


def to_json(collections: Sequence[Collection]) -> str:
    """An object with the rule of the marks and the rows."""
    record = {"rule": grid_table.RULE, "rows": to_rows(collections)}
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


Table = tuple[str, list[str], list[list[str]]]
"""Title, header and rows."""


def _tables(collections: Sequence[Collection]) -> list[Table]:
    """The grid by data set and family, then the other experiments."""
    tables: list[Table] = []
    for table in grid_table.make_tables(collections):
        header = ["placement", *(f"rank {rank}" for rank in grid.RANKS)]
        rows = [[placement, *map(_format_cell, cells)] for placement, cells in table.rows]
        title = f"{table.title}: test {table.collection.measure}, % [95 %]"
        tables.append((title + (", published" if table.has_published else ""), header, rows))
    if others := grid_table.other_comparisons(collections):
        header = ["data set", "experiment", "placement", "rank", "score [95 %]"]
        tables.append(("Other experiments: test score, % [95 %]", header, [_other_row(row) for row in others]))
    return tables


def _other_row(comparison: Comparison) -> list[str]:
    experiment = comparison.experiment
    rank = "–" if experiment.rank is None else str(experiment.rank)
    return [experiment.dataset, experiment.name, experiment.placement, rank, _format_comparison(comparison)]


def _format_cell(cell: Cell) -> str:
    text = "–" if cell.comparison is None else _format_comparison(cell.comparison)
    return f"{text}, {cell.published.text}" if cell.published else text


def _format_comparison(comparison: Comparison) -> str:
    if comparison.score is None:
        return "–"
    ends = comparison.interval
    interval = f" [{ends[0].text}–{ends[1].text}]" if ends else ""
    mark = f" {comparison.mark}" if comparison.mark else ""
    return f"{comparison.score.text}{interval}{mark}"


def to_markdown(collections: Sequence[Collection]) -> str:
    """Tables in GitHub's Markdown."""
    parts = []
    for title, header, rows in _tables(collections):
        lines = [f"**{_escape_markdown(title)}**", "", _markdown_row(header)]
        lines.append("|" + "---|" + "---:|" * (len(header) - 1))
        parts.append("\n".join([*lines, *map(_markdown_row, rows)]))
    return "\n\n".join([*parts, grid_table.RULE]) + "\n"


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_escape_markdown, cells)) + " |"


def _escape_markdown(text: str) -> str:
    for character in "\\|<>*_`":
        text = text.replace(character, f"\\{character}")
    return " ".join(text.split())


_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "–": "--",
    "−": "$-$",
    "▲": r"$\blacktriangle$",
    "▼": r"$\blacktriangledown$",
    "·": r"$\cdot$",
    "±": r"$\pm$",
}


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def to_latex(collections: Sequence[Collection]) -> str:
    """One `table` with `booktabs` rules per table; needs the packages booktabs and amssymb."""
    parts = ["% \\usepackage{booktabs,amssymb}"]
    for title, header, rows in _tables(collections):
        body = [_latex_row(header), r"\midrule", *map(_latex_row, rows)]
        lines = [
            r"\begin{table}",
            r"\centering",
            f"\\caption{{{_escape_latex(title)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(header) - 1)}}}",
            r"\toprule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
        parts.append("\n".join(lines))
    return "\n\n".join([*parts, f"% {grid_table.RULE}"]) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    # A row that begins with [ would be read as an argument of the line end before it.
    return " & ".join(_escape_latex(cell) for cell in cells).replace("[", "{[}").replace("]", "{]}") + r" \\"


WRITERS: dict[str, Callable[[Sequence[Collection]], str]] = {
    ".md": to_markdown,
    ".tex": to_latex,
    ".csv": to_csv,
    ".json": to_json,
}
"""File suffix → function that makes the content."""
