"""`blipfit retain`: what candidates keep of an original and what they save, as a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import run as folders
from blipfit.commands import evaluate as evaluations
from blipfit.errors import UserError
from blipfit.evaluation import retention
from blipfit.evaluation.retention import Answers
from blipfit.model import cost, loading, shapes
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelConfig
from blipfit.report import terminal
from blipfit.run import Run


def run(
    base: str,
    candidates: Sequence[str],
    on: str,
    folder: Path | None,
    split: str,
    limit: int | None,
    at_least: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """Judge all on the same samples; the record holds accuracies, retentions, costs and who is on the front."""
    names = [base, *candidates]
    if len(set(names)) < len(names):
        raise UserError("a model is named twice; give the original once and every candidate once")
    for name in names:  # before anything is judged
        loading.locate(ModelConfig(name=_model(name)))
    sets = evaluations.places(on, folder)
    screen = terminal.console(stderr=True)
    found = retention.answers(
        names, sets, device, split, limit, listen=lambda sentence: screen.print(sentence, soft_wrap=True)
    )
    lengths = Lengths()
    costs = [_cost(name, lengths) for name in names]
    record: dict[str, Any] = {
        "base": base,
        "split": split,
        "on": {what: retention.told(answered) for what, answered in found[0].items()},
        "cost": costs[0],
        "at_least": at_least,
        "candidates": [
            _candidate(name, found[0], answered, costs[0], price, at_least)
            for name, answered, price in zip(candidates, found[1:], costs[1:], strict=True)
        ],
    }
    points = [(_price(one), one["retention"]) for one in record["candidates"]]
    for one, best in zip(record["candidates"], retention.pareto(points), strict=True):
        one["pareto"] = best
    return record


def _model(name: str) -> str:
    """The checkpoint that a model's name or a run stands on."""
    one = Run(Path(name))
    return one.recipe().model.name if one.recipe_file.exists() else name


def _cost(name: str, lengths: Lengths) -> dict[str, float]:
    """By shapes; an adapter is counted as merged."""
    hf = shapes.on_meta(_model(name))
    flops = cost.flops(hf.config, lengths)
    return {
        "qformer_parameters": cost.qformer_parameters(hf),
        "parameters": sum(cost.parameters(hf).values()),
        "query_flops": flops["query"],
        "flops": flops["see"] + flops["query"] + flops["rank"],
    }


def _candidate(
    name: str,
    base: Mapping[str, Answers],
    answered: Mapping[str, Answers],
    before: Mapping[str, float],
    after: Mapping[str, float],
    at_least: float | None,
) -> dict[str, Any]:
    kept = {what: retention.retained(base[what], answered[what]) for what in base}
    ratios = [one["corrected"]["ratio"] for one in kept.values()]
    return {
        "name": name,
        "on": kept,
        "retention": None if None in ratios else sum(ratios) / len(ratios),
        "cost": dict(after),
        "shares": {key: after[key] / before[key] for key in before},
        "misses": [] if at_least is None else [n for n, one in kept.items() if retention.misses(one, at_least)],
    }


def _price(one: Mapping[str, Any]) -> list[float]:
    return [one["shares"]["qformer_parameters"], one["shares"]["query_flops"], one["shares"]["flops"]]


# --------------------------------------------------------------------- shown


def shown(record: Mapping[str, Any]) -> list[Any]:
    """What `retain` prints."""
    table = Table(title=f"kept of {record['base']}, {record['split']} split", title_justify="left")
    table.add_column("")
    for name in ("on", "accuracy [95 %]", "chance", "raw", "chance-corrected [95 %]"):
        table.add_column(name, justify="left" if name == "on" else "right")
    for name in ("Q-Former", "its FLOPs", "all FLOPs", "front"):
        table.add_column(name, justify="right")
    for what, alone in record["on"].items():
        table.add_row(
            record["base"], what, terminal.percent(alone), f"{alone['chance']:.1f}", "", "", "100 %", "100 %", "100 %"
        )
    for one in record["candidates"]:
        table.add_section()
        shares = [f"{100 * one['shares'][key]:.1f} %" for key in ("qformer_parameters", "query_flops", "flops")]
        for number, (what, kept) in enumerate(one["on"].items()):
            cells = [terminal.percent(kept), f"{kept['chance']:.1f}", _told(kept["raw"]), _told(kept["corrected"])]
            first = [*shares, "●" if one["pareto"] else ""] if not number else []
            table.add_row(one["name"] if not number else "", what, *cells, *first)
    samples = ", ".join(f"{alone['samples']} of {name}" for name, alone in record["on"].items())
    lines: list[Any] = [table, f"the same samples for all ({samples}); ●: no other costs less and keeps more"]
    if any(kept["corrected"]["ratio"] is None for one in record["candidates"] for kept in one["on"].values()):
        lines.append("no chance-corrected retention: the original is not surely above chance there")
    return lines + [_verdict(one, record["at_least"]) for one in record["candidates"] if record["at_least"] is not None]


def _told(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "–"
    low, high = (f"{100 * end:.1f}" if end is not None else "∞" for end in ratio["interval"])
    return f"{100 * ratio['ratio']:.1f} % [{low}–{high}]"


def _verdict(one: Mapping[str, Any], at_least: float) -> str:
    if one["misses"]:
        return f"{one['name']} does not surely keep {100 * at_least:g} % on {', '.join(one['misses'])}"
    return f"{one['name']} keeps at least {100 * at_least:g} % on every set (lower ends of the intervals)"


def figure(record: Mapping[str, Any], file: Path) -> None:
    """Retention against the share of the Q-Former's parameters, a line a set."""
    from matplotlib.figure import Figure

    if file.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise UserError(f"--figure {file}: give a file that ends in .png, .svg or .pdf")
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    ordered = sorted(record["candidates"], key=lambda one: one["shares"]["qformer_parameters"])
    for what in record["on"]:
        points = [(one["shares"]["qformer_parameters"], one["on"][what]["corrected"]) for one in ordered]
        points = [(share, kept) for share, kept in points if kept["ratio"] is not None]
        if points:
            _line(axes, what, points)
    if record["at_least"] is not None:
        axes.axhline(100 * record["at_least"], color="#888888", linewidth=1, linestyle=":")
    axes.axhline(100, color="#cccccc", linewidth=1, zorder=0)
    axes.set_xlabel("parameters of query tokens, Q-Former and projection, % of the original's")
    axes.set_ylabel("chance-corrected retention, %")
    axes.set_title(f"kept of {record['base']}", loc="left")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    with folders.replacing(file) as temporary:
        drawn.savefig(temporary, dpi=150)


def _line(axes: Any, what: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    x = [100 * share for share, _ in points]
    y = [100 * kept["ratio"] for _, kept in points]
    ends = [[100 * (end if end is not None else kept["ratio"]) for end in kept["interval"]] for _, kept in points]
    errors = [
        [v - low for v, (low, _) in zip(y, ends, strict=True)],
        [h - v for v, (_, h) in zip(y, ends, strict=True)],
    ]
    axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=what)
