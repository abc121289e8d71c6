"""Many recipes → banks → finished run folders.

Experiments with the same model, data and batches can share a bank. Its size is measured: banks of 1, 2, 4, … take a
few trial steps, and the size with the least time per experiment among those that fit into memory is used.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from blipfit.adapters import open_model
from blipfit.errors import UserError
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run_folder import Inputs, Run
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training import bank_member, bank_trials, checkpoint, disk_needs, events
from blipfit.training.bank_trials import Trial
from blipfit.training.events import Listener
from blipfit.training.loop import check_inputs, train
from blipfit.training.model_cache import ModelCache

T = TypeVar("T")

MAX_SLOWDOWN = 1.05
"""Larger banks are not tried once the time per experiment is above 1.05 times the lowest measured one."""


@dataclass(frozen=True, slots=True)
class PlannedBank:
    """Experiments that will train together, and the trial that their cost was measured with."""

    recipes: tuple[Recipe, ...]
    trial: Trial
    seconds: float
    """Estimated time of training and evaluation to the last epoch; early stopping makes it shorter."""

    @property
    def step_seconds(self) -> float:
        """Time of one step of the bank; it may hold fewer experiments than the trial had."""
        return len(self.recipes) * self.trial.seconds_each


@dataclass(frozen=True, slots=True)
class PlannedGroup:
    """Experiments that can share a bank, with the measured trials and the work of one experiment."""

    recipes: tuple[Recipe, ...]
    trials: tuple[Trial, ...]
    steps_per_epoch: int
    val_questions: int
    test_questions: int
    is_fixed: bool = False
    """Whether the size of its banks is given: by the user, or by a checkpoint that several experiments share."""

    @property
    def best(self) -> Trial:
        """The trial with the least time per experiment."""
        return min(self.trials, key=lambda trial: trial.seconds_each)

    def bank_seconds(self, recipes: Sequence[Recipe]) -> float:
        """Time of a bank of these experiments to the last epoch, evaluation included."""
        size, epochs = len(recipes), max(recipe.training.max_epochs for recipe in recipes)
        questions = (epochs + 1) * self.val_questions + self.test_questions
        steps = epochs * self.steps_per_epoch
        return steps * self._interpolate("seconds", size) + questions * self._interpolate("evaluation_seconds", size)

    def _interpolate(self, name: str, size: int) -> float:
        """A trial's time for a bank of this size: linear between two measured sizes, proportional outside of them."""
        points = [(trial.experiments, float(getattr(trial, name))) for trial in self.trials]
        below = max((point for point in points if point[0] <= size), default=min(points))
        above = min((point for point in points if point[0] >= size), default=max(points))
        if below[0] == above[0] or not below[0] <= size <= above[0]:
            nearest = below if below[0] <= size else above
            return nearest[1] * size / nearest[0]
        share = (size - below[0]) / (above[0] - below[0])
        return below[1] + share * (above[1] - below[1])

    def divide(self, number: int) -> list[PlannedBank]:
        """Divide the experiments into `number` banks of nearly equal size."""
        parts = split_evenly(self.recipes, number)
        return [PlannedBank(tuple(part), self.best, self.bank_seconds(part)) for part in parts]


@dataclass(frozen=True, slots=True)
class Plan:
    """The banks of a sweep, in the order in which they will train."""

    banks: tuple[PlannedBank, ...]
    finished: tuple[Recipe, ...]
    """Experiments with a result, which are skipped."""
    trials: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)
    """The measured trials, by the name of their group of experiments."""
    groups: tuple[PlannedGroup, ...] = ()

    @property
    def seconds(self) -> float:
        """Estimated time of all banks, one after the other."""
        return sum(bank.seconds for bank in self.banks)


def make_plan(
    recipes: Sequence[Recipe],
    data: Mapping[str, Path],
    results: Path,
    model_cache: ModelCache,
    bank: int | None = None,
    listener: Listener = events.ignore,
) -> Plan:
    """Group the experiments that are not finished into banks of `bank` experiments, or of a size that trials decide.

    `data`: folder of each data set. Banks are ordered by their first experiment. Raises UserError if an input cannot be
    used, or if not even the smallest bank fits into memory.

    Several processes measure together and make the same plan.
    """
    groups, finished = group_unfinished(recipes, data, results)
    planned_groups: list[PlannedGroup] = []
    banks: list[PlannedBank] = []
    trials: dict[str, tuple[Trial, ...]] = {}
    for saved_bank, members in groups:
        name = f"{members[0].title} and {len(members) - 1} more" if len(members) > 1 else members[0].title
        listener(events.TrialStarted(name, len(members)))
        size = bank or (len(members) if saved_bank else None)
        trials[name] = measure_trials(members, data[members[0].data.name], model_cache, size)
        group = _describe_group(members, trials[name], data, model_cache, is_fixed=size is not None)
        planned_groups.append(group)
        banks += _divide(group)
    return Plan(tuple(banks), tuple(finished), trials, tuple(planned_groups))


def group_unfinished(
    recipes: Sequence[Recipe], data: Mapping[str, Path], results: Path
) -> tuple[list[tuple[tuple[str, ...], list[Recipe]]], list[Recipe]]:
    """The experiments that can share a bank, with the titles of the bank that they continue, and the finished ones.

    Raises UserError if an input cannot be used.
    """
    groups: dict[Any, list[Recipe]] = {}
    finished = []
    recipes = sorted(_distinct(recipes), key=lambda recipe: _first_use(recipes, recipe))
    inputs = _check_inputs_by_title(recipes, data)
    for recipe in recipes:
        run = Run.of(results, recipe)
        run.refuse_other(recipe, inputs[recipe.title])
        if run.state() == "finished":
            finished.append(recipe)
        else:
            saved_bank = checkpoint.read_bank(run.checkpoint)  # it continues with the same experiments
            groups.setdefault((bank_member.bank_key(recipe), saved_bank), []).append(recipe)
    return [(saved_bank, members) for (_, saved_bank), members in groups.items()], finished


def _distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Each experiment once. Raises UserError if two different recipes have the same run folder."""
    by_title: dict[str, Recipe] = {}
    for recipe in recipes:
        if by_title.setdefault(recipe.title, recipe) != recipe:
            raise UserError(f"two different recipes are called {recipe.title}; give each its own experiment name")
    return list(by_title.values())


def _first_use(recipes: Sequence[Recipe], recipe: Recipe) -> int:
    """Position of the first recipe with the same model, so that each model is loaded once for all its experiments."""
    return next(i for i, other in enumerate(recipes) if other.model == recipe.model)


def _check_inputs_by_title(recipes: Sequence[Recipe], data: Mapping[str, Path]) -> dict[str, Inputs]:
    """Check all inputs, and return what each experiment is trained and evaluated with by its title."""
    inputs: dict[str, Inputs] = {}
    for name in dict.fromkeys(recipe.data.name for recipe in recipes):
        recipes_of_set = [recipe for recipe in recipes if recipe.data.name == name]
        inputs_of_set = check_inputs(recipes_of_set, data[name])
        inputs |= {recipe.title: each for recipe, each in zip(recipes_of_set, inputs_of_set, strict=True)}
    return inputs


def measure_trials(
    members: Sequence[Recipe], data: Path, model_cache: ModelCache, bank: int | None
) -> tuple[Trial, ...]:
    """Trials of larger and larger banks of these experiments, until a bank is slower or does not fit; at least one.

    Raises UserError if not even the smallest bank fits into memory.
    """
    backbone, encoded_split = model_cache.backbone(members[0]), model_cache.splits(members[0], data)["train"]
    image_features = ImageFeatures.from_backbone(backbone, "off")  # a plan writes nothing, so no store
    sizes = [min(bank, len(members))] if bank else _doubling(len(members))
    trials: list[Trial] = []
    for size in sizes:
        latest = bank_trials.measure(backbone, _spread(members, size), encoded_split, image_features)
        if latest is None:
            break
        trials.append(latest)
        if latest.seconds_each > MAX_SLOWDOWN * min(t.seconds_each for t in trials):
            break
    if not trials:
        raise UserError(
            f"a bank of {sizes[0]} does not fit the memory of {model_cache.device}; "
            "use a smaller --bank, or lower training.batch_size and raise training.accumulation"
        )
    return tuple(trials)


def _describe_group(
    members: Sequence[Recipe],
    trials: Sequence[Trial],
    data: Mapping[str, Path],
    model_cache: ModelCache,
    is_fixed: bool = False,
) -> PlannedGroup:
    splits = model_cache.splits(members[0], data[members[0].data.name])
    training = members[0].training
    steps = len(splits["train"]) // (training.batch_size * training.accumulation)
    return PlannedGroup(tuple(members), tuple(trials), steps, len(splits["val"]), len(splits["test"]), is_fixed)


def _divide(group: PlannedGroup) -> list[PlannedBank]:
    """Banks of at most the best measured size, as even as possible."""
    return group.divide(-(-len(group.recipes) // group.best.experiments))


def run(
    planned: Plan,
    data: Mapping[str, Path],
    results: Path,
    model_cache: ModelCache,
    listener: Listener = events.ignore,
    save_interval: SaveInterval | None = None,
) -> list[Run]:
    """Train every bank of a plan, one after the other; returns all runs, the skipped ones first."""
    disk_needs.require_space([bank.recipes for bank in planned.banks], data, results)
    runs = [Run.of(results, recipe) for recipe in planned.finished]
    for recipe, run in zip(planned.finished, runs, strict=True):
        run.tidy()
        listener(events.RunSkipped(run, recipe, open_model.describe_adapter_problem(run)))
    for number, bank in enumerate(planned.banks, start=1):
        listener(events.BankStarted(number, len(planned.banks), bank.recipes))
        folder = data[bank.recipes[0].data.name]
        runs += train(
            bank.recipes, folder, results, model_cache=model_cache, listener=listener, save_interval=save_interval
        )
    return runs


def split_evenly(items: Sequence[T], number: int) -> list[Sequence[T]]:
    """Split a sequence into `number` parts of nearly equal length, in order."""
    return [items[i * len(items) // number : (i + 1) * len(items) // number] for i in range(number)]


def _doubling(most: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _spread(members: Sequence[Recipe], size: int) -> list[Recipe]:
    """A sample spread over the whole list: neighbors in the grid have the same placement, a bank has several."""
    return [members[i * len(members) // size] for i in range(size)]
