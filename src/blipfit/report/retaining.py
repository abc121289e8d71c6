"""`blipfit retain`: what candidates keep of an original and what they save, as a table and a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import run as folders
from blipfit.errors import UserError
from blipfit.evaluation import retention
from blipfit.evaluation.metrics import accuracy
from blipfit.evaluation.retention import Judge
from blipfit.model import cost, loading, shapes
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelPart
from blipfit.report import experiments, terminal
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
        loading.locate(ModelPart(name=_model(name)))
    judges = [retention.judge(name, place, split, limit) for name, place in _places(on, folder)]
    screen = terminal.console(stderr=True)
    found = retention.answers(names, judges, device, listen=lambda name: screen.print(f"judging {name} …"))
    lengths = Lengths()
    costs = [_cost(name, lengths) for name in names]
    record: dict[str, Any] = {
        "base": base,
        "split": split,
        "on": {judged.name: {"samples": len(judged.questions), **_alone(judged, found[0])} for judged in judges},
        "cost": costs[0],
        "at_least": at_least,
        "candidates": [
            _candidate(name, judges, found[0], right, costs[0], price, at_least)
            for name, right, price in zip(candidates, found[1:], costs[1:], strict=True)
        ],
    }
    points = [(_price(one), one["retention"]) for one in record["candidates"]]
    for one, best in zip(record["candidates"], retention.pareto(points), strict=True):
        one["pareto"] = best
    return record


def _places(on: str, folder: Path | None) -> list[tuple[str, Path]]:
    """`icons,mme=DIR` as names with their folders."""
    asked = [part.partition("=") for part in on.split(",") if part]
    if not asked:
        raise UserError("say on what: --on icons, or --on icons,mme=DIR")
    if folder is not None and len(asked) > 1:
        raise UserError("--data names one folder and --on several data sets; write --on icons=DIR,mme=DIR")
    if len({name for name, _, _ in asked}) < len(asked):
        raise UserError(f"--on {on} names a data set twice")
    return [(name, experiments.data_folder(name, Path(place) if place else folder)) for name, _, place in asked]


def _model(name: str) -> str:
    """The checkpoint that a model's name or a run stands on."""
    one = Run(Path(name))
    return one.recipe().model.name if one.recipe_file.exists() else name


def _alone(judged: Judge, right: Mapping[str, Sequence[bool]]) -> dict[str, Any]:
    chance = judged.chance
    return {"chance": round(100 * sum(chance) / len(chance), 4), **accuracy(right[judged.name])}


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
    judges: Sequence[Judge],
    base: Mapping[str, Sequence[bool]],
    right: Mapping[str, Sequence[bool]],
    before: Mapping[str, float],
    after: Mapping[str, float],
    at_least: float | None,
) -> dict[str, Any]:
    kept = {j.name: retention.retained(base[j.name], right[j.name], j.chance) for j in judges}
    ratios = [one["corrected"]["ratio"] for one in kept.values()]
    return {
        "name": name,
        "judges": kept,
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
    for name in ("judge", "accuracy [95 %]", "chance", "raw", "chance-corrected [95 %]"):
        table.add_column(name, justify="left" if name == "judge" else "right")
    for name in ("Q-Former", "its FLOPs", "all FLOPs", "front"):
        table.add_column(name, justify="right")
    for judge, alone in record["on"].items():
        table.add_row(
            record["base"], judge, terminal.percent(alone), f"{alone['chance']:.1f}", "", "", "100 %", "100 %", "100 %"
        )
    for one in record["candidates"]:
        table.add_section()
        shares = [f"{100 * one['shares'][key]:.1f} %" for key in ("qformer_parameters", "query_flops", "flops")]
        for number, (judge, kept) in enumerate(one["judges"].items()):
            cells = [terminal.percent(kept), f"{kept['chance']:.1f}", _told(kept["raw"]), _told(kept["corrected"])]
            first = [*shares, "●" if one["pareto"] else ""] if not number else []
            table.add_row(one["name"] if not number else "", judge, *cells, *first)
    samples = ", ".join(f"{alone['samples']} of {name}" for name, alone in record["on"].items())
    lines: list[Any] = [table, f"the same samples for all ({samples}); ●: no other costs less and keeps more"]
    if any(kept["corrected"]["ratio"] is None for one in record["candidates"] for kept in one["judges"].values()):
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
    return f"{one['name']} keeps at least {100 * at_least:g} % on every judge (lower ends of the intervals)"


def figure(record: Mapping[str, Any], file: Path) -> None:
    """Retention against the share of the Q-Former's parameters, a line a judge."""
    from matplotlib.figure import Figure

    if file.suffix.lstrip(".") not in ("png", "svg", "pdf"):
        raise UserError(f"--figure {file}: give a file that ends in .png, .svg or .pdf")
    drawn = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = drawn.add_subplot()
    ordered = sorted(record["candidates"], key=lambda one: one["shares"]["qformer_parameters"])
    for judge in record["on"]:
        points = [(one["shares"]["qformer_parameters"], one["judges"][judge]["corrected"]) for one in ordered]
        points = [(share, kept) for share, kept in points if kept["ratio"] is not None]
        if points:
            _line(axes, judge, points)
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


def _line(axes: Any, judge: str, points: Sequence[tuple[float, Mapping[str, Any]]]) -> None:
    x = [100 * share for share, _ in points]
    y = [100 * kept["ratio"] for _, kept in points]
    ends = [[100 * (end if end is not None else kept["ratio"]) for end in kept["interval"]] for _, kept in points]
    errors = [
        [v - low for v, (low, _) in zip(y, ends, strict=True)],
        [h - v for v, (_, h) in zip(y, ends, strict=True)],
    ]
    axes.errorbar(x, y, yerr=errors, marker="o", capsize=3, label=judge)
