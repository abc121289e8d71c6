"""`blipfit retain`: how much of an original's performance candidates retain, and what they cost."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit.adapters import open_model
from blipfit.commands import resolve_arguments
from blipfit.errors import UserError
from blipfit.evaluation import changed_data, retention_vs_original
from blipfit.evaluation.retention_vs_original import SampleScores
from blipfit.model import cost, shapes
from blipfit.model.cost import Lengths
from blipfit.report import retention_figure, terminal
from blipfit.run_folder import Run

COSTS = ("qformer_parameters", "query_flops", "flops")
"""Costs that decide on the Pareto front, as shares of the original's."""


def run(
    base: str,
    candidates: Sequence[str],
    on: str,
    data: Path | None,
    split: str,
    limit: int | None,
    at_least: float | None,
    device: torch.device,
) -> dict[str, Any]:
    """Evaluate the original and all candidates on the same samples; accuracies, retentions, costs and Pareto front.

    Raises UserError if a model, a run or a data set cannot be used, or if a name is given twice.
    """
    names = [base, *candidates]
    if len(set(names)) < len(names):
        raise UserError("a model is named twice; give the original once and every candidate once")
    models, runs = _locate(names)
    folders = resolve_arguments.data_folders(on, data)
    screen = terminal.console(stderr=True)
    warnings = _describe_changed_images(runs, folders, split)
    for warning in warnings:
        screen.print(f"warning: {warning}", soft_wrap=True)
    scores = retention_vs_original.score_models(
        names, folders, device, split, limit, announce=lambda sentence: screen.print(sentence, soft_wrap=True)
    )
    costs = [_cost(model, Lengths()) for model in models]
    record: dict[str, Any] = {
        "base": base,
        "split": split,
        "on": {dataset: retention_vs_original.summarize(base_scores) for dataset, base_scores in scores[0].items()},
        "cost": costs[0],
        "at_least": at_least,
        **open_model.warning_fields(warnings),
        "candidates": [
            _candidate_record(name, scores[0], candidate_scores, costs[0], candidate_cost, at_least)
            for name, candidate_scores, candidate_cost in zip(candidates, scores[1:], costs[1:], strict=True)
        ],
    }
    points = [([c["shares"][key] for key in COSTS], c["retention"]) for c in record["candidates"]]
    for candidate, on_front in zip(record["candidates"], retention_vs_original.pareto_front(points), strict=True):
        candidate["pareto"] = on_front
    return record


def _locate(names: Sequence[str]) -> tuple[list[str], list[Run]]:
    """Check all models and runs before the first is evaluated; return the base models' names, and the runs."""
    models, runs = [], []
    for name in names:
        source = open_model.locate_model(name)  # not kept, because it holds the adapter
        models.append(source.model.name)
        if source.run is not None:
            runs.append(source.run)
    return models, runs


def _describe_changed_images(runs: Sequence[Run], folders: Sequence[tuple[str, Path]], split: str) -> list[str]:
    """Sentences on the runs whose own data set is among those of the comparison and has other images now."""
    return [
        sentence
        for run in runs
        for name, folder in folders
        for sentence in changed_data.describe_changed_images(run, name, split, folder)
    ]


def any_may_be_below(record: Mapping[str, Any]) -> bool:
    """Whether a candidate retains less than `at_least` on some data set."""
    return any(candidate["misses"] for candidate in record["candidates"])


def _cost(model: str, lengths: Lengths) -> dict[str, float]:
    """Parameters and FLOPs from the model's configuration; an adapter adds nothing, as if it were merged."""
    hf = shapes.on_meta(model)
    flops = cost.flops(hf.config, lengths)
    return {
        "qformer_parameters": cost.qformer_parameters(hf),
        "parameters": sum(cost.parameters(hf).values()),
        "query_flops": flops["query"],
        "flops": flops["see"] + flops["query"] + flops["rank"],
    }


def _candidate_record(
    name: str,
    base_scores: Mapping[str, SampleScores],
    scores: Mapping[str, SampleScores],
    base_cost: Mapping[str, float],
    candidate_cost: Mapping[str, float],
    at_least: float | None,
) -> dict[str, Any]:
    retentions = {
        dataset: retention_vs_original.compute_retention(base_scores[dataset], scores[dataset]) for dataset in scores
    }
    ratios = [values["corrected"]["ratio"] for values in retentions.values()]
    misses = []
    if at_least is not None:
        misses = [
            dataset for dataset, values in retentions.items() if retention_vs_original.may_be_below(values, at_least)
        ]
    return {
        "name": name,
        "on": retentions,
        "retention": None if None in ratios else sum(ratios) / len(ratios),
        "cost": dict(candidate_cost),
        "shares": {key: candidate_cost[key] / base_cost[key] for key in base_cost},
        "misses": misses,
    }


def render(record: Mapping[str, Any]) -> list[Any]:
    """One row per model and data set, then notes and whether `--at-least` is reached."""
    table = Table(title=f"retention of {record['base']}, {record['split']} split", title_justify="left")
    table.add_column("model")
    for name in ("on", "accuracy [95 %]", "chance", "raw", "chance-corrected [95 %]"):
        table.add_column(name, justify="left" if name == "on" else "right")
    for name in ("Q-Former", "its FLOPs", "all FLOPs", "front"):
        table.add_column(name, justify="right")
    for dataset, summary in record["on"].items():
        accuracy = terminal.format_accuracy(summary)
        shares = ["100 %"] * len(COSTS)
        table.add_row(record["base"], dataset, accuracy, f"{summary['chance']:.1f}", "", "", *shares)
    for candidate in record["candidates"]:
        table.add_section()
        _add_candidate(table, candidate)
    samples = ", ".join(f"{summary['samples']} of {name}" for name, summary in record["on"].items())
    lines: list[Any] = [table, f"the same samples for all ({samples}); ●: no other costs less and retains more"]
    corrected = [values["corrected"] for candidate in record["candidates"] for values in candidate["on"].values()]
    if any(ratio["ratio"] is None for ratio in corrected):
        lines.append("no chance-corrected retention where the original's 95 % confidence interval is not above chance")
    if record["at_least"] is not None:
        lines += [_format_verdict(candidate, record["at_least"]) for candidate in record["candidates"]]
    return lines


def _add_candidate(table: Table, candidate: Mapping[str, Any]) -> None:
    shares = [f"{100 * candidate['shares'][key]:.1f} %" for key in COSTS]
    for number, (dataset, values) in enumerate(candidate["on"].items()):
        is_first = number == 0
        table.add_row(
            candidate["name"] if is_first else "",
            dataset,
            terminal.format_accuracy(values),
            f"{values['chance']:.1f}",
            _format_ratio(values["raw"]),
            _format_ratio(values["corrected"]),
            *([*shares, "●" if candidate["pareto"] else ""] if is_first else []),
        )


def _format_ratio(ratio: Mapping[str, Any]) -> str:
    if ratio["ratio"] is None:
        return "–"
    low, high = (f"{100 * end:.1f}" if end is not None else "∞" for end in ratio["interval"])
    return f"{100 * ratio['ratio']:.1f} % [{low}–{high}]"


def _format_verdict(candidate: Mapping[str, Any], at_least: float) -> str:
    share = f"{100 * at_least:g} %"
    if candidate["misses"]:
        datasets = ", ".join(candidate["misses"])
        return (
            f"{candidate['name']}: on {datasets} the lower end of the 95 % confidence interval is below {share}, "
            "or there is no retention to compare"
        )
    return f"{candidate['name']} retains at least {share} on every data set (lower ends of the 95 % intervals)"


def write_figure(record: Mapping[str, Any], file: Path) -> None:
    """Write retention against size as .png, .svg or .pdf. Raises UserError for any other suffix."""
    retention_figure.write(record, file)
