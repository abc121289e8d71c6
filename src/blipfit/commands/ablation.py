"""`blipfit ablation`: what each sublayer, the rank and the language model do to the accuracy, from finished runs alone.

Experiments are compared in pairs that differ in one thing only; an effect is the mean of the pairs' differences in
test accuracy, in percentage points, with a bootstrap interval over the pairs.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from blipfit import methods
from blipfit.errors import UserError
from blipfit.evaluation import text
from blipfit.model import shapes
from blipfit.recipe import LANGUAGE_SUBLAYERS, QFORMER_SUBLAYERS, Recipe
from blipfit.run import Run

TOWERS: Mapping[str, tuple[str, ...]] = {"qformer": QFORMER_SUBLAYERS, "llm": LANGUAGE_SUBLAYERS}
_SINGLE = tuple(f"{tower} {part}" for tower, parts in TOWERS.items() for part in parts)
TUNED = ("learning_rate", "max_epochs", "patience", "weight_decay", "betas", "batch_size", "accumulation")
"""Fields of training that are chosen for each experiment to do its best, so pairs may differ in them."""
FAMILIES = ("t5", "vicuna")
_ORDER = (*methods.OWN, *methods.PEFT)
KINDS = {
    "added": "added to what else is adapted",
    "instead": "alone, in place of another sublayer of its tower",
    "full": "the Q-Former fully trained",
    "rank": "rank",
    "family": "language model",
    "method": "method",
}
"""Kinds of effects, in the table's order."""


class Effect(NamedTuple):
    """What is compared; rows of the table."""

    kind: str
    """`added`: with it against without; `instead`: alone, in place of another sublayer of its tower; `full`: the
    Q-Former fully trained; `rank`; `family`; `method`."""
    what: str
    against: str


@dataclass(frozen=True, slots=True)
class Experiment:
    """A finished run as the comparison sees it."""

    name: str
    accuracy: float
    factors: Mapping[str, Any]
    """What may differ in a pair, one thing at a time; None where it says nothing (a rank without LoRA)."""
    rest: Any
    """What must be equal."""
    tuned: Any


@dataclass(slots=True)
class Found:
    """The pairs of an effect."""

    runs: list[tuple[str, str, float]] = field(default_factory=list)
    """Name without, name with, difference in points."""
    alike: int = 0
    """Pairs whose tuned fields are equal too."""

    def record(self, effect: Effect) -> dict[str, Any]:
        told = text.mean([difference for _, _, difference in self.runs])
        several = len(self.runs) > 1  # one difference tells nothing of its spread
        return {
            **effect._asdict(),
            "mean": None if told["mean"] is None else round(told["mean"], 4),
            "interval": [round(end, 4) for end in told["interval"]] if several else None,
            "pairs": len(self.runs),
            "same_settings": self.alike,
            "runs": [[one, other, round(difference, 4)] for one, other, difference in self.runs],
        }


def examine(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """A record of effects for each folder RESULTS/DATASET; UserError where one has no finished run."""
    return [_record(folder) for folder in folders]


def _record(folder: Path) -> dict[str, Any]:
    experiments = read(folder)
    found = effects(experiments)
    return {
        "folder": str(folder),
        "dataset": folder.resolve().name,
        "experiments": len(experiments),
        "effects": [pairs.record(effect) for effect, pairs in found.items()],
    }


def read(folder: Path) -> list[Experiment]:
    """The finished runs of RESULTS/DATASET, by name."""
    runs = [Run(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    finished = [run for run in runs if run.state() == "finished"]
    if not finished:
        raise UserError(f"{folder} holds no finished run; give the folder of a data set's runs: RESULTS/DATASET")
    return [experiment(run.recipe(), run.result()["metrics"]["test"]["accuracy"]) for run in finished]


def experiment(recipe: Recipe, accuracy: float) -> Experiment:
    """An experiment's recipe taken apart; `accuracy` in percent."""
    adapter, training = recipe.adapter, recipe.training
    adapted = bool(adapter.llm) or adapter.qformer not in ("full", ())
    ranked = adapted and methods.ranked(adapter.method)
    factors = {
        "qformer": "full" if adapter.qformer == "full" else frozenset(adapter.qformer),
        "llm": frozenset(adapter.llm),
        "rank": adapter.rank if ranked else None,
        "alpha": adapter.alpha if ranked else None,
        "method": adapter.method if adapted else None,
        "model": (recipe.model.name, recipe.model.revision),
    }
    rest = recipe.model_dump(exclude={"experiment": True, "model": {"name", "revision"}, "training": set(TUNED)})
    rest["adapter"] = {name: value for name, value in rest["adapter"].items() if name not in factors}
    tuned = {name: getattr(training, name) for name in TUNED if name not in ("batch_size", "accumulation")}
    # However a batch is cut into forward passes, the step is the same.
    tuned["effective_batch"] = training.batch_size * training.accumulation
    return Experiment(recipe.experiment, accuracy, factors, rest, tuned)


def effects(experiments: Sequence[Experiment]) -> dict[Effect, Found]:
    """All pairs by what they differ in; every single sublayer has an entry, if an empty one. In the table's order."""
    found = {Effect("added", name, ""): Found() for name in _SINGLE}
    for one, other in combinations(experiments, 2):
        for effect, without, within in _compared(one, other):
            pairs = found.setdefault(effect, Found())
            pairs.runs.append((without.name, within.name, within.accuracy - without.accuracy))
            pairs.alike += without.tuned == within.tuned
    return {effect: found[effect] for effect in sorted(found, key=_place)}


def _place(effect: Effect) -> tuple[Any, ...]:
    """By kind; single sublayers in the order of the model, then several; ranks by number."""
    numbers = [int(word) for word in effect.what.split() if word.isdigit()]
    place = _SINGLE.index(effect.what) if effect.what in _SINGLE else len(_SINGLE)
    several = effect.what.count("+") + effect.against.count("+")
    return list(KINDS).index(effect.kind), place, several, numbers, effect.what, effect.against


Compared = tuple[Effect, Experiment, Experiment]
"""The effect, the experiment without and the one with it."""


def _compared(one: Experiment, other: Experiment) -> Iterator[Compared]:
    """What a pair tells; nothing where it differs in more than one thing."""
    if one.rest != other.rest:
        return
    differing = [name for name in one.factors if not _alike(one.factors[name], other.factors[name])]
    if len(differing) != 1:
        return
    (name,) = differing
    for first, second in ((one, other), (other, one)):
        found = _effects(name, first.factors[name], second.factors[name])
        yield from ((effect, first, second) for effect in found)


def _alike(value: Any, other: Any) -> bool:
    return value is None or other is None or value == other


def _effects(factor: str, without: Any, within: Any) -> Iterator[Effect]:
    """What one value of a factor against another is called; nothing for the other way round."""
    if factor in TOWERS:
        yield from _sublayers(factor, without, within)
    elif factor == "rank" and within == 2 * without:
        yield Effect("rank", "rank doubled", "")
        yield Effect("rank", f"rank {within}", f"rank {without}")
    elif factor == "model" and (_family(without[0]), _family(within[0])) == FAMILIES:
        yield Effect("family", FAMILIES[1], FAMILIES[0])
    elif factor == "method" and _ORDER.index(without) < _ORDER.index(within):
        yield Effect("method", within, without)


def _sublayers(tower: str, without: Any, within: Any) -> Iterator[Effect]:
    if without == "full":
        return
    if within == "full":
        yield Effect("full", "qformer full", f"LoRA in {_named(tower, without)}" if without else "qformer frozen")
    elif without < within:
        yield Effect("added", f"{tower} {_named(tower, within - without)}", "")
    elif len(without) == len(within) == 1:
        yield Effect("instead", f"{tower} {_named(tower, within)}", "another alone")


def _named(tower: str, parts: frozenset[str]) -> str:
    return "+".join(part for part in TOWERS[tower] if part in parts)


@lru_cache
def _family(model: str) -> str | None:
    """The language-model family, or None where neither the name nor a folder tells it."""
    try:
        return shapes.family(model)
    except UserError:
        return None


# --------------------------------------------------------------------- shown


def table(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """What `ablation` prints: effects side by side for every data set."""
    rows = {Effect(e["kind"], e["what"], e["against"]): None for record in records for e in record["effects"]}
    order = sorted(rows, key=lambda effect: list(KINDS).index(effect.kind))  # stable: a kind's rows as they come
    drawn = Table(title="mean difference in test accuracy, points [95 %]", title_justify="left")
    drawn.add_column("effect of")
    drawn.add_column("against")
    for record in records:
        drawn.add_column(record["dataset"], justify="right")
        drawn.add_column("pairs", justify="right")
    by_folder = [{Effect(e["kind"], e["what"], e["against"]): e for e in record["effects"]} for record in records]
    for number, effect in enumerate(order):
        if number == 0 or order[number - 1].kind != effect.kind:
            drawn.add_section()
            drawn.add_row(KINDS[effect.kind], style="italic")
        cells: list[str] = []
        for found in by_folder:
            cells += _cells(found.get(effect))
        drawn.add_row(f"  {effect.what}", effect.against or ("without" if effect.kind == "added" else ""), *cells)
    return [drawn, *_sentences(records)]


def _cells(effect: Mapping[str, Any] | None) -> tuple[str, str]:
    if effect is None or not effect["pairs"]:
        return "–", "0"
    ends = effect["interval"]
    interval = f" [{ends[0]:+.2f} – {ends[1]:+.2f}]" if ends else ""
    return f"{effect['mean']:+.2f}{interval}", str(effect["pairs"])


def _sentences(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        pairs = sum(effect["pairs"] for effect in record["effects"])
        same = sum(effect["same_settings"] for effect in record["effects"])
        yield (
            f"{record['dataset']}: {record['experiments']} experiments; {same} of the {pairs} comparisons are between "
            "runs with equal training settings, in the others learning rate, batch or epochs differ too"
        )
        missing = [effect["what"] for effect in record["effects"] if effect["kind"] == "added" and not effect["pairs"]]
        if missing:
            yield f"{record['dataset']}: no two experiments differ in just {', '.join(missing)}"
