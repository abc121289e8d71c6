"""`blipfit sweep`: many experiments, planned into banks and trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import sweep
from blipfit.commands import train
from blipfit.recipe import Recipe
from blipfit.report import terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.runtime import distributed
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training import events
from blipfit.training.model_cache import ModelCache


def run(
    recipes: Sequence[Recipe],
    folders: Mapping[str, Path],
    results: Path,
    bank: int | None,
    only_plan: bool,
    device: torch.device,
    save_interval: SaveInterval | None = None,
) -> dict[str, Any]:
    """Plan the banks, print the plan, train them; with `only_plan` the record holds nothing but the plan.

    Raises UserError before anything is trained if an input cannot be used or no bank fits into memory.
    """
    model_cache = ModelCache(device)
    with TrainingDisplay() as display:
        listener = display if distributed.is_main() else events.ignore
        plan = sweep.make_plan(recipes, folders, results, model_cache, bank, listener)
        record: dict[str, Any] = {"plan": plan_record(plan)}
        if not only_plan:
            if distributed.is_main():
                display.console.print(plan_table(record["plan"]))
            record |= train.summarize(sweep.run(plan, folders, results, model_cache, listener, save_interval))
    return record


def render(record: Mapping[str, Any]) -> list[Any]:
    """The plan, or after training the results."""
    if "results" not in record:
        return [plan_table(record["plan"])]
    return train.render({**record, "results": sorted(record["results"], key=_sort_key)})


def plan_record(plan: sweep.Plan) -> dict[str, Any]:
    """A plan as a record."""
    return {
        "banks": [
            {
                "experiments": [recipe.title for recipe in bank.recipes],
                "seconds": round(bank.seconds, 1),
                "seconds_per_step": bank.step_seconds,
                "bytes": bank.trial.memory,
            }
            for bank in plan.banks
        ],
        "trials": {
            name: [{"experiments": t.experiments, "seconds_each": t.seconds_each, "bytes": t.memory} for t in trials]
            for name, trials in plan.trials.items()
        },
        "finished": [recipe.title for recipe in plan.finished],
        "seconds": round(plan.seconds, 1),
    }


def plan_table(plan: Mapping[str, Any]) -> Table:
    """Banks with their measured step, memory and longest time."""
    banks = plan["banks"]
    experiments = sum(len(bank["experiments"]) for bank in banks)
    table = Table(
        title=f"{terminal.format_count(experiments, 'experiment')} in {terminal.format_count(len(banks), 'bank')}, "
        f"{len(plan['finished'])} finished already; at most {terminal.format_duration(plan['seconds'])}",
        title_justify="left",
    )
    for name in ("bank", "experiments", "at once", "step", "per experiment", "memory", "at most"):
        table.add_column(name, justify="left" if name == "experiments" else "right")
    for number, bank in enumerate(banks, 1):
        size = len(bank["experiments"])
        table.add_row(
            str(number),
            format_titles(bank["experiments"]),
            str(size),
            f"{1000 * bank['seconds_per_step']:.0f} ms",
            f"{1000 * bank['seconds_per_step'] / size:.0f} ms",
            f"{bank['bytes'] / 2**30:.2f} GiB",
            terminal.format_duration(bank["seconds"]),
        )
    return table


def format_titles(titles: Sequence[str]) -> str:
    """`icons/13`, `icons/14`, … as `icons 13–28`."""
    dataset = titles[0].partition("/")[0]
    groups: list[list[str]] = []
    for title in titles:
        name = title.partition("/")[2]
        if groups and name.isdigit() and groups[-1][-1].isdigit() and int(name) == int(groups[-1][-1]) + 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    spans = ", ".join(group[0] if len(group) == 1 else f"{group[0]}–{group[-1]}" for group in groups)
    return f"{dataset} {spans}"


def _sort_key(record: Mapping[str, Any]) -> tuple[str, int, str]:
    name = record["experiment"]
    return record["dataset"], int(name) if name.isdigit() else 0, name
