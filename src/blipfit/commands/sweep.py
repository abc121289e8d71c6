"""Sweeps as people see them: which experiments, the plan with its cost, the table at the end."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import sweep
from blipfit.commands import arguments as experiments
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.report import terminal
from blipfit.training.model_cache import ModelCache


@dataclass(frozen=True, slots=True)
class Swept:
    record: dict[str, Any]
    shown: list[Any]


def chosen(
    datasets: str, ids: Sequence[str], model: str | None, assignments: Sequence[str], data: Path | None
) -> tuple[list[Recipe], dict[str, Path]]:
    """The recipes of a command line, and the folder of every data set among them."""
    recipes: list[Recipe] = []
    for text in ids:
        if text.endswith((".yaml", ".yml")):
            recipes += experiments.chosen(text, [], model, assignments)
            continue
        names = sweep.experiments(text)
        for dataset in datasets.split(","):
            recipes += experiments.chosen(dataset, names, model, assignments)
    used = list(dict.fromkeys(recipe.data.name for recipe in recipes))
    if data is not None and len(used) > 1:
        raise UserError(f"--data names one folder and the sweep reads {', '.join(used)}; leave it out to use data/NAME")
    return recipes, {name: experiments.data_folder(name, data) for name in used}


def run(
    recipes: Sequence[Recipe],
    folders: Mapping[str, Path],
    results: Path,
    bank: int | None,
    only_plan: bool,
    device: torch.device,
) -> Swept:
    """Plan, say what it will cost, train, and tell how it ended."""
    display = terminal.TrainingDisplay()
    model_cache = ModelCache(device)
    try:
        return _swept(recipes, folders, results, bank, only_plan, model_cache, display)
    finally:
        display.close()


def _swept(
    recipes: Sequence[Recipe],
    folders: Mapping[str, Path],
    results: Path,
    bank: int | None,
    only_plan: bool,
    model_cache: ModelCache,
    display: terminal.TrainingDisplay,
) -> Swept:
    planned = sweep.make_plan(recipes, folders, results, model_cache, bank, display)
    record: dict[str, Any] = {"plan": describe(planned)}
    if only_plan:
        return Swept(record, [plan_table(planned)])
    display.console.print(plan_table(planned))
    runs = sweep.run(planned, folders, results, model_cache, display)
    finished = [one.result() for one in runs if one.state() == "finished"]
    failed = {str(one.folder): one.failure() for one in runs if one.state() != "finished"}
    record |= {"results": finished, "failed": failed}
    shown: list[Any] = [terminal.results(sorted(finished, key=_order))] if finished else []
    return Swept(record, [*shown, *(f"failed: {folder}: {reason}" for folder, reason in failed.items())])


def describe(planned: sweep.Plan) -> dict[str, Any]:
    """A plan as a record."""
    return {
        "banks": [
            {
                "experiments": [recipe.title for recipe in bank.recipes],
                "seconds": round(bank.seconds, 1),
                "seconds_per_step": bank.step_seconds,
                "bytes": bank.trial.memory,
            }
            for bank in planned.banks
        ],
        "trials": {
            name: [{"experiments": t.experiments, "seconds_each": t.seconds_each, "bytes": t.memory} for t in trials]
            for name, trials in planned.trials.items()
        },
        "finished": [recipe.title for recipe in planned.finished],
        "seconds": round(planned.seconds, 1),
    }


def plan_table(planned: sweep.Plan) -> Table:
    """Banks with their measured step, memory and longest time."""
    at_most = terminal.duration(planned.seconds)
    table = Table(
        title=f"{sum(len(b.recipes) for b in planned.banks)} experiments in {len(planned.banks)} banks, "
        f"{len(planned.finished)} finished already; at most {at_most}",
        title_justify="left",
    )
    for name in ("bank", "experiments", "at once", "step", "an experiment's share", "memory", "at most"):
        table.add_column(name, justify="left" if name == "experiments" else "right")
    for number, bank in enumerate(planned.banks, 1):
        table.add_row(
            str(number),
            _ranges(bank.recipes),
            str(len(bank.recipes)),
            f"{1000 * bank.step_seconds:.0f} ms",
            f"{1000 * bank.trial.seconds_each:.0f} ms",
            f"{bank.trial.memory / 2**30:.2f} GiB",
            terminal.duration(bank.seconds),
        )
    return table


def _ranges(recipes: Sequence[Recipe]) -> str:
    """`icons 13–28`."""
    names = [recipe.experiment for recipe in recipes]
    groups: list[list[str]] = []
    for name in names:
        if groups and name.isdigit() and groups[-1][-1].isdigit() and int(name) == int(groups[-1][-1]) + 1:
            groups[-1].append(name)
        else:
            groups.append([name])
    told = ", ".join(g[0] if len(g) == 1 else f"{g[0]}–{g[-1]}" for g in groups)
    return f"{recipes[0].data.name} {told}"


def _order(record: Mapping[str, Any]) -> tuple[str, int, str]:
    name = record["experiment"]
    return record["dataset"], int(name) if name.isdigit() else 0, name
