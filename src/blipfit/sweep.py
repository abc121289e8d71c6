"""Many recipes → banks → finished run folders.

Experiments with the same model, data and batches can share a bank. Its size is measured: banks of 1, 2, 4, … take a
few trial steps, and the size with the least time per experiment among those that fit into memory is used.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfit import grid
from blipfit.errors import UserError
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.runtime import distributed
from blipfit.training import bank_member, events, trial_steps
from blipfit.training.events import Listener
from blipfit.training.loop import check_inputs, train
from blipfit.training.model_cache import ModelCache
from blipfit.training.trial_steps import Trial

MAX_SLOWDOWN = 1.05
"""Larger banks are not tried once a step takes 1.05 times the lowest time per experiment."""


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
class Plan:
    """The banks of a sweep, in the order in which they will train."""

    banks: tuple[PlannedBank, ...]
    finished: tuple[Recipe, ...]
    """Experiments with a result, which are skipped."""
    trials: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)
    """The measured trials, by the name of their group of experiments."""

    @property
    def seconds(self) -> float:
        """Estimated time of all banks, one after the other."""
        return sum(bank.seconds for bank in self.banks)


def parse_experiments(text: str) -> list[str]:
    """Experiment names in `1-32`, `13,15,28`, `all` (1–64), `baseline` or any such list.

    Raises UserError for anything else.
    """
    names: list[str] = []
    for part in text.replace(" ", "").split(","):
        low, dash, high = part.partition("-")
        if part == "all":
            names += map(str, grid.IDS)
        elif part in (*grid.BASELINES, *grid.EXPLORATIONS, grid.RECOVERY):
            names.append(part)
        elif dash and low.isdigit() and high.isdigit() and int(low) <= int(high) <= grid.IDS[-1]:
            names += map(str, range(int(low), int(high) + 1))
        elif part.isdigit():
            names.append(part)
        else:
            known = f"write 1-32, 13,15,28, all, {', '.join(grid.BASELINES)} or {grid.RECOVERY}"
            raise UserError(f"{text!r} names no experiments: {part!r} is not understood; {known}")
    return list(dict.fromkeys(names))


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
    """
    if distributed.state().num_processes > 1:
        raise UserError("a sweep measures on one process; launch `train` with several, or run the sweep without")
    groups: dict[Any, list[Recipe]] = {}
    finished = []
    recipes = sorted(_distinct(recipes), key=lambda recipe: _first_use(recipes, recipe))
    hashes = _hash_questions_by_title(recipes, data)
    for recipe in recipes:
        run = Run.of(results, recipe)
        run.refuse_other(recipe, hashes[recipe.title])
        if run.state() == "finished":
            finished.append(recipe)
        else:
            groups.setdefault(bank_member.bank_key(recipe), []).append(recipe)
    banks: list[PlannedBank] = []
    trials: dict[str, tuple[Trial, ...]] = {}
    for members in groups.values():
        name = f"{members[0].title} and {len(members) - 1} more" if len(members) > 1 else members[0].title
        listener(events.TrialStarted(name, len(members)))
        trials[name] = measure_trials(members, data[members[0].data.name], model_cache, bank)
        banks += _divide(members, trials[name], data, model_cache)
    return Plan(tuple(banks), tuple(finished), trials)


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


def _hash_questions_by_title(recipes: Sequence[Recipe], data: Mapping[str, Path]) -> dict[str, str]:
    """Check all inputs, and return the hash of each experiment's questions by its title."""
    hashes: dict[str, str] = {}
    for name in dict.fromkeys(recipe.data.name for recipe in recipes):
        recipes_of_set = [recipe for recipe in recipes if recipe.data.name == name]
        digests = check_inputs(recipes_of_set, data[name])
        hashes |= {recipe.title: digest for recipe, digest in zip(recipes_of_set, digests, strict=True)}
    return hashes


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
        latest = trial_steps.measure(backbone, _spread(members, size), encoded_split, image_features)
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


def _divide(
    members: Sequence[Recipe], trials: Sequence[Trial], data: Mapping[str, Path], model_cache: ModelCache
) -> Iterable[PlannedBank]:
    """Banks of at most the best measured size, as even as possible."""
    best = min(trials, key=lambda t: t.seconds_each)
    number = -(-len(members) // best.experiments)
    splits = model_cache.splits(members[0], data[members[0].data.name])
    training = members[0].training
    steps = len(splits["train"]) // (training.batch_size * training.accumulation)
    for index in range(number):
        recipes = tuple(members[index * len(members) // number : (index + 1) * len(members) // number])
        epochs = max(recipe.training.max_epochs for recipe in recipes)
        questions = (epochs + 1) * len(splits["val"]) + len(splits["test"])
        evaluation_seconds = questions * best.evaluation_seconds / best.experiments
        seconds = len(recipes) * (epochs * steps * best.seconds_each + evaluation_seconds)
        yield PlannedBank(recipes, best, seconds)


def run(
    planned: Plan,
    data: Mapping[str, Path],
    results: Path,
    model_cache: ModelCache,
    listener: Listener = events.ignore,
) -> list[Run]:
    """Train every bank of a plan, one after the other; returns all runs, the skipped ones first."""
    runs = [Run.of(results, recipe) for recipe in planned.finished]
    for recipe, run in zip(planned.finished, runs, strict=True):
        listener(events.RunSkipped(run, recipe))
    for number, bank in enumerate(planned.banks, start=1):
        listener(events.BankStarted(number, len(planned.banks), bank.recipes))
        folder = data[bank.recipes[0].data.name]
        runs += train(bank.recipes, folder, results, model_cache=model_cache, listener=listener)
    return runs


def _doubling(most: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _spread(members: Sequence[Recipe], size: int) -> list[Recipe]:
    """A sample spread over the whole list: neighbors in the grid have the same placement, a bank has several."""
    return [members[i * len(members) // size] for i in range(size)]
