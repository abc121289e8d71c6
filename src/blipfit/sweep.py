"""Many recipes → banks → finished run folders: what can run together does, as many at once as pays.

Experiments that share backbone, data and batches may share a bank. How many is measured: banks of 1, 2, 4, … take a
few trial steps, and the size with the least time per experiment that fits memory is taken.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfit import grid
from blipfit.errors import UserError
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run import Run
from blipfit.runtime import distributed
from blipfit.training import plan, trial
from blipfit.training.loop import Listener, check_inputs, train
from blipfit.training.model_cache import ModelCache
from blipfit.training.trial import Trial

WORSE = 1.05
"""Growing stops when an experiment's share of a step is that much slower than the best seen."""


@dataclass(frozen=True, slots=True)
class PlannedBank:
    """Experiments that will train together, and what that was measured to cost."""

    recipes: tuple[Recipe, ...]
    trial: Trial
    seconds: float
    """Of training and judging to the last epoch; early stopping makes it shorter."""

    @property
    def step_seconds(self) -> float:
        """Of one step; a bank may hold fewer experiments than the trial had."""
        return len(self.recipes) * self.trial.seconds_each


@dataclass(frozen=True, slots=True)
class Plan:
    banks: tuple[PlannedBank, ...]
    finished: tuple[Recipe, ...]
    """Done already; skipped."""
    trials: Mapping[str, tuple[Trial, ...]] = field(default_factory=dict)
    """What was measured, by the group of experiments."""

    @property
    def seconds(self) -> float:
        return sum(bank.seconds for bank in self.banks)


def experiments(text: str) -> list[str]:
    """Experiment names of `1-32`, `13,15,28`, `all`, `baseline` or any such list.

    Raises UserError on anything else; `all` is 1–64.
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
    listen: Listener = lambda event, facts: None,
) -> Plan:
    """Group what is not finished into banks; `bank` fixes their size, else trial steps decide it.

    `data` gives each data set's folder. The banks come in the order of their first experiment.
    """
    if distributed.state().num_processes > 1:
        raise UserError("a sweep measures on one process; launch `train` with several, or run the sweep without")
    groups: dict[Any, list[Recipe]] = {}
    finished = []
    recipes = sorted(_distinct(recipes), key=lambda recipe: _first_use(recipes, recipe))
    hashes = _checked(recipes, data)
    for recipe in recipes:
        run = Run.of(results, recipe)
        run.refuse_other(recipe, hashes[recipe.title])
        if run.state() == "finished":
            finished.append(recipe)
        else:
            groups.setdefault(plan.bank_key(recipe), []).append(recipe)
    banks: list[PlannedBank] = []
    trials: dict[str, tuple[Trial, ...]] = {}
    for members in groups.values():
        name = f"{members[0].title} and {len(members) - 1} more" if len(members) > 1 else members[0].title
        listen("planning", {"group": name, "experiments": len(members)})
        trials[name] = measured(members, data[members[0].data.name], model_cache, bank)
        banks += _divided(members, trials[name], data, model_cache)
    return Plan(tuple(banks), tuple(finished), trials)


def _distinct(recipes: Sequence[Recipe]) -> list[Recipe]:
    """Each experiment once; UserError where two recipes want the same run folder."""
    named: dict[str, Recipe] = {}
    for recipe in recipes:
        if named.setdefault(recipe.title, recipe) != recipe:
            raise UserError(f"two different recipes are called {recipe.title}; give each its own experiment name")
    return list(named.values())


def _first_use(recipes: Sequence[Recipe], recipe: Recipe) -> int:
    """Where a recipe's model is first asked for, so that each model is loaded for all its experiments at once."""
    return next(i for i, other in enumerate(recipes) if other.model == recipe.model)


def _checked(recipes: Sequence[Recipe], data: Mapping[str, Path]) -> dict[str, str]:
    """The hash of each experiment's questions, by its title, after all input checks."""
    hashes: dict[str, str] = {}
    for name in dict.fromkeys(recipe.data.name for recipe in recipes):
        mine = [recipe for recipe in recipes if recipe.data.name == name]
        found = check_inputs(mine, data[name])
        hashes |= {recipe.title: digest for recipe, digest in zip(mine, found, strict=True)}
    return hashes


def measured(members: Sequence[Recipe], data: Path, model_cache: ModelCache, bank: int | None) -> tuple[Trial, ...]:
    """Trials of growing banks of these experiments, until it stops paying or fitting; at least one."""
    backbone, encoded_split = model_cache.backbone(members[0]), model_cache.splits(members[0], data)["train"]
    image_features = ImageFeatures.from_backbone(backbone, "off")  # a plan writes nothing, so no store
    sizes = [min(bank, len(members))] if bank else _doubling(len(members))
    found: list[Trial] = []
    for size in sizes:
        one = trial.measure(backbone, _spread(members, size), encoded_split, image_features)
        if one is None:
            break
        found.append(one)
        if one.seconds_each > WORSE * min(t.seconds_each for t in found):
            break
    if not found:
        raise UserError(
            f"a bank of {sizes[0]} does not fit the memory of {model_cache.device}; "
            "use a smaller --bank, or lower training.batch_size and raise training.accumulation"
        )
    return tuple(found)


def _divided(
    members: Sequence[Recipe], trials: Sequence[Trial], data: Mapping[str, Path], model_cache: ModelCache
) -> Iterable[PlannedBank]:
    """Banks of the best measured size, as even as they can be."""
    best = min(trials, key=lambda t: t.seconds_each)
    number = -(-len(members) // best.experiments)
    splits = model_cache.splits(members[0], data[members[0].data.name])
    training = members[0].training
    steps = len(splits["train"]) // (training.batch_size * training.accumulation)
    for index in range(number):
        chosen = tuple(members[index * len(members) // number : (index + 1) * len(members) // number])
        epochs = max(recipe.training.max_epochs for recipe in chosen)
        judged = (epochs + 1) * len(splits["val"]) + len(splits["test"])
        judging = judged * best.evaluation_seconds / best.experiments
        seconds = len(chosen) * (epochs * steps * best.seconds_each + judging)
        yield PlannedBank(chosen, best, seconds)


def run(
    planned: Plan,
    data: Mapping[str, Path],
    results: Path,
    model_cache: ModelCache,
    listen: Listener = lambda event, facts: None,
) -> list[Run]:
    """Train every bank of a plan, one after the other; returns all runs, the skipped ones first."""
    runs = [Run.of(results, recipe) for recipe in planned.finished]
    for recipe, one in zip(planned.finished, runs, strict=True):
        listen("skipped", {"run": one, "recipe": recipe})
    for number, bank in enumerate(planned.banks):
        listen("bank", {"number": number + 1, "of": len(planned.banks), "recipes": bank.recipes})
        folder = data[bank.recipes[0].data.name]
        runs += train(bank.recipes, folder, results, model_cache=model_cache, listen=listen)
    return runs


def _doubling(most: int) -> list[int]:
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(2 * sizes[-1], most))
    return sizes


def _spread(members: Sequence[Recipe], size: int) -> list[Recipe]:
    """A sample over the whole list: neighbours in the grid have the same placement, a bank has several."""
    return [members[i * len(members) // size] for i in range(size)]
