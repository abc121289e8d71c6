"""The figure of `blipfit retain`: retention against size."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.errors import UserError
from blipfit.report import figure_files, terminal


def write(record: Mapping[str, Any], file: Path) -> None:
    """Plot retention against the share of the Q-Former's parameters, one line per data set, with the candidates' names.

    Raises UserError unless the file ends in .png, .svg or .pdf.
    """
    from matplotlib.figure import Figure

    if file.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise UserError(f"--figure {file}: give a file that ends in .png, .svg or .pdf")
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot()
    candidates = sorted(record["candidates"], key=lambda candidate: candidate["shares"]["qformer_parameters"])
    _write_names(axes, candidates)
    for dataset in record["on"]:
        points = [(c["shares"]["qformer_parameters"], c["on"][dataset]["corrected"]) for c in candidates]
        points = [(share, ratio) for share, ratio in points if ratio["ratio"] is not None]
        if points:
            _plot(axes, dataset, points)
    if record["at_least"] is not None:
        axes.axhline(100 * record["at_least"], color="#888888", linewidth=1, linestyle=":")
    axes.axhline(100, color="#cccccc", linewidth=1, zorder=0)
    axes.set_xlabel("parameters of query tokens, Q-Former and projection, % of the original's")
    axes.set_ylabel("chance-corrected retention, %")
    axes.set_title(f"retention of {record['base']}", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure_files.save_figure(figure, file, dpi=150)


def _write_names(axes: Any, candidates: Sequence[Mapping[str, Any]]) -> None:
    """Write each candidate's name above the highest of its points."""
    names = terminal.distinct_names([candidate["name"] for candidate in candidates])
    for candidate, name in zip(candidates, names, strict=True):
        ratios = [values["corrected"]["ratio"] for values in candidate["on"].values()]
        if heights := [100 * ratio for ratio in ratios if ratio is not None]:
            x = 100 * candidate["shares"]["qformer_parameters"]
            axes.annotate(name, (x, max(heights)), xytext=(5, 5), textcoords="offset points", fontsize="small")


def _plot(axes: Any, label: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    """A line with error bars; an interval without an end stops at the value."""
    x = [100 * share for share, _ in points]
    y = [100 * ratio["ratio"] for _, ratio in points]
    ends = [[100 * (end if end is not None else ratio["ratio"]) for end in ratio["interval"]] for _, ratio in points]
    below = [value - low for value, (low, _) in zip(y, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(y, ends, strict=True)]
    axes.errorbar(x, y, yerr=[below, above], marker="o", capsize=3, label=label)
