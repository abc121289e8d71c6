"""From recipes to units: banks cut for a number of workers, from trials that were measured on a machine like them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from blipfit import run_folder, sweep
from blipfit.cluster import schedule
from blipfit.cluster.schedule import Failures
from blipfit.cluster.units import SweepFolder, Unit
from blipfit.errors import UserError
from blipfit.recipe import Recipe
from blipfit.sweep import PlannedGroup
from blipfit.training.bank_trials import Trial


@dataclass(frozen=True, slots=True)
class MeasuredPlan:
    """The groups of a sweep with their trials, and the machine that these were measured on."""

    groups: tuple[PlannedGroup, ...]
    device: str
    start_seconds: float
    """Time to load the model and the questions, measured once."""

    def to_json(self) -> dict[str, Any]:
        """Return what `plan.json` holds."""
        return {
            "measured_on": self.device,
            "start_seconds": round(self.start_seconds, 3),
            "groups": [
                {
                    "experiments": [recipe.title for recipe in group.recipes],
                    "trials": [asdict(trial) for trial in group.trials],
                    "steps_per_epoch": group.steps_per_epoch,
                    "val_questions": group.val_questions,
                    "test_questions": group.test_questions,
                    "is_fixed": group.is_fixed,
                }
                for group in self.groups
            ],
        }

    @classmethod
    def read(cls, file: Path, recipes: Sequence[Recipe]) -> "MeasuredPlan":
        """Read `plan.json` for these recipes. Raises UserError if it is missing or damaged."""
        values, by_title = run_folder.read_json(file), {recipe.title: recipe for recipe in recipes}
        try:
            groups = tuple(
                PlannedGroup(
                    tuple(by_title[title] for title in group["experiments"]),
                    tuple(Trial(**trial) for trial in group["trials"]),
                    group["steps_per_epoch"],
                    group["val_questions"],
                    group["test_questions"],
                    group["is_fixed"],
                )
                for group in values["groups"]
            )
            return cls(groups, values["measured_on"], values["start_seconds"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{file} is damaged ({error!s:.100}); plan the sweep again with --plan --gpus") from None

    def cut(self, workers: int) -> list[tuple[tuple[Recipe, ...], float]]:
        """The experiments of each bank and its time, for so many workers; banks of a fixed size stay as they are."""
        divisible = [group for group in self.groups if not group.is_fixed]
        models = [_to_schedule(group) for group in divisible]
        counts = dict(
            zip(map(id, divisible), schedule.choose_bank_counts(models, workers, self.start_seconds), strict=True)
        )
        banks = []
        for group in self.groups:
            fixed_count = -(-len(group.recipes) // group.best.experiments)
            banks += group.divide(counts.get(id(group), fixed_count))
        return [(bank.recipes, self.start_seconds + bank.seconds) for bank in banks]


def _to_schedule(group: PlannedGroup) -> schedule.Group:
    return schedule.Group(tuple(group.bank_seconds(group.recipes[:size]) for size in range(1, len(group.recipes) + 1)))


def estimate(
    measured: MeasuredPlan, gpus: Sequence[int], failures: Failures, price_per_hour: float | None
) -> list[Any]:
    """One record per number of GPUs: units, time, how busy the GPUs are, and cost, as the mean of 20 simulations."""
    records = []
    for count in gpus:
        seconds = [time for _, time in measured.cut(count)]
        expected = schedule.expect(seconds, count, failures)
        records.append(
            {
                "gpus": count,
                "units": len(seconds),
                "shortest_unit_seconds": round(min(seconds, default=0.0), 1),
                "longest_unit_seconds": round(max(seconds, default=0.0), 1),
                "seconds": round(expected.seconds, 1),
                "seconds_without_failures": round(schedule.simulate(seconds, count).seconds, 1),
                "busy": round(expected.busy, 4),
                "failures": expected.failures,
                "gpu_hours": round(expected.worker_hours, 3),
                **({} if price_per_hour is None else {"price": round(price_per_hour * expected.worker_hours, 2)}),
            }
        )
    return records


def make_units(
    recipes: Sequence[Recipe],
    data: Mapping[str, Path],
    results: Path,
    folder: SweepFolder,
    bank: int | None,
    workers: int | None,
    template: Unit,
) -> list[Unit]:
    """The units of a sweep: those that were written before, else new ones for all experiments that are not finished.

    `bank`: experiments per bank; None: as the trials in the sweep's `plan.json` say, for so many `workers`. `template`
    holds the options of all units. Raises UserError if neither is there, or if an input cannot be used.
    """
    if units := folder.read_units():
        return units
    groups, _ = sweep.group_unfinished(recipes, data, results)
    banks: list[tuple[tuple[Recipe, ...], float | None]] = []
    measured: dict[str, tuple[tuple[Recipe, ...], float]] = {}
    if bank is None and any(not saved_bank for saved_bank, _ in groups):
        if not folder.plan_file.exists():
            raise UserError(
                "the size of the banks is not known, because nothing was measured; add --bank K, or run this command "
                "with --plan --gpus N first, on a machine with the GPU that will train"
            )
        cut = MeasuredPlan.read(folder.plan_file, recipes).cut(workers or 1)
        measured = {recipe.title: (members, seconds) for members, seconds in cut for recipe in members}
    for saved_bank, members in groups:
        if bank is None and not saved_bank:
            parts = {measured[recipe.title][0]: measured[recipe.title][1] for recipe in members}
            unfinished = [(tuple(r for r in part if r in members), seconds) for part, seconds in parts.items()]
            banks += [(part, seconds) for part, seconds in unfinished if part]
        else:
            number = -(-len(members) // (bank if bank and not saved_bank else len(members)))
            banks += [(tuple(part), None) for part in sweep.split_evenly(members, number)]
    units = [
        replace(template, number=number, recipes=part, data=data[part[0].data.name].resolve(), seconds=seconds)
        for number, (part, seconds) in enumerate(banks)
    ]
    folder.write_units(units)
    return units
