"""`blipfit ablation`: the effect of each sublayer, the rank and the language model on the accuracy.

Finished runs are compared in pairs that differ in one factor; an effect is the mean difference in test accuracy over
these pairs, in percentage points, with a bootstrap interval over the pairs.
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
from blipfit.evaluation import bootstrap
from blipfit.model import families
from blipfit.recipe import LANGUAGE_SUBLAYERS, QFORMER_SUBLAYERS, Recipe
from blipfit.run_folder import Run

TOWERS: Mapping[str, tuple[str, ...]] = {"qformer": QFORMER_SUBLAYERS, "llm": LANGUAGE_SUBLAYERS}
_SINGLE = tuple(f"{tower} {part}" for tower, parts in TOWERS.items() for part in parts)
MAY_DIFFER = ("learning_rate", "max_epochs", "patience", "weight_decay", "betas", "batch_size", "accumulation")
"""Training fields that are tuned for each experiment, so pairs may differ in them."""
FAMILIES = ("t5", "vicuna")
_ORDER = (*methods.OWN, *methods.PEFT)
KINDS = {
    "added": "added to the other adapted sublayers",
    "instead": "alone, instead of another sublayer of its tower",
    "full": "the Q-Former fully trained",
    "rank": "rank",
    "family": "language model",
    "method": "method",
}
"""Kinds of effects, in the table's order."""


class Effect(NamedTuple):
    """A comparison; one row of the table."""

    kind: str
    """`added`: with it against without; `instead`: alone, instead of another sublayer of its tower; `full`: the
    Q-Former fully trained; `rank`; `family`; `method`."""
    what: str
    against: str


@dataclass(frozen=True, slots=True)
class Experiment:
    """A finished run, its recipe divided into what may and what must not differ within a pair."""

    name: str
    accuracy: float
    factors: Mapping[str, Any]
    """Factors of which a pair differs in exactly one; None if a factor does not apply (a rank without LoRA)."""
    fixed: Any
    """Must be equal within a pair."""
    tuned: Any
    """May differ within a pair; see `MAY_DIFFER`."""


@dataclass(slots=True)
class EffectPairs:
    """The pairs of an effect."""

    differences: list[tuple[str, str, float]] = field(default_factory=list)
    """Experiment without, experiment with, difference in percentage points."""
    same_settings: int = 0
    """Pairs whose tuned fields are equal too."""

    def record(self, effect: Effect) -> dict[str, Any]:
        """The effect with its mean and interval."""
        estimate = bootstrap.mean([difference for _, _, difference in self.differences])
        has_spread = len(self.differences) > 1
        return {
            **effect._asdict(),
            "mean": None if estimate["mean"] is None else round(estimate["mean"], 4),
            "interval": [round(end, 4) for end in estimate["interval"]] if has_spread else None,
            "pairs": len(self.differences),
            "same_settings": self.same_settings,
            "runs": [[reference, changed, round(value, 4)] for reference, changed, value in self.differences],
        }


def run(folders: Sequence[Path]) -> list[dict[str, Any]]:
    """One record of effects per folder RESULTS/DATASET. Raises UserError if a folder has no finished run."""
    return [_folder_record(folder) for folder in folders]


def _folder_record(folder: Path) -> dict[str, Any]:
    experiments = read_experiments(folder)
    return {
        "folder": str(folder),
        "dataset": folder.resolve().name,
        "experiments": len(experiments),
        "effects": [pairs.record(effect) for effect, pairs in find_effects(experiments).items()],
    }


def read_experiments(folder: Path) -> list[Experiment]:
    """The finished runs of RESULTS/DATASET, by name. Raises UserError if there are none."""
    runs = [Run(path) for path in sorted(folder.iterdir())] if folder.is_dir() else []
    finished = [run for run in runs if run.state() == "finished"]
    if not finished:
        raise UserError(f"{folder} holds no finished run; give the folder of a data set's runs: RESULTS/DATASET")
    return [divide_recipe(run.recipe(), run.result()["metrics"]["test"]["accuracy"]) for run in finished]


def divide_recipe(recipe: Recipe, accuracy: float) -> Experiment:
    """The factors, the fixed and the tuned fields of an experiment; `accuracy` in percent."""
    adapter, training = recipe.adapter, recipe.training
    ranked = adapter.has_lora and methods.has_rank(adapter.method)
    factors = {
        "qformer": "full" if adapter.qformer == "full" else frozenset(adapter.qformer),
        "llm": frozenset(adapter.llm),
        "rank": adapter.rank if ranked else None,
        "alpha": adapter.alpha if ranked else None,
        "method": adapter.method if adapter.has_lora else None,
        "model": (recipe.model.name, recipe.model.revision),
    }
    fixed = recipe.model_dump(exclude={"experiment": True, "model": {"name", "revision"}, "training": set(MAY_DIFFER)})
    fixed["adapter"] = {name: value for name, value in fixed["adapter"].items() if name not in factors}
    tuned = {name: getattr(training, name) for name in MAY_DIFFER if name not in ("batch_size", "accumulation")}
    # Only the effective batch matters for the result, not how it is divided into forward passes.
    tuned["effective_batch"] = training.batch_size * training.accumulation
    return Experiment(recipe.experiment, accuracy, factors, fixed, tuned)


def find_effects(experiments: Sequence[Experiment]) -> dict[Effect, EffectPairs]:
    """All pairs by their effect, in the table's order; every single sublayer has an entry, even without pairs."""
    effects = {Effect(kind="added", what=name, against=""): EffectPairs() for name in _SINGLE}
    for first, second in combinations(experiments, 2):
        for effect, reference, changed in _compare(first, second):
            pairs = effects.setdefault(effect, EffectPairs())
            pairs.differences.append((reference.name, changed.name, changed.accuracy - reference.accuracy))
            pairs.same_settings += reference.tuned == changed.tuned
    return {effect: effects[effect] for effect in sorted(effects, key=_sort_key)}


def _sort_key(effect: Effect) -> tuple[Any, ...]:
    """By kind; single sublayers in the model's order, then groups of sublayers; ranks by number."""
    numbers = [int(word) for word in effect.what.split() if word.isdigit()]
    place = _SINGLE.index(effect.what) if effect.what in _SINGLE else len(_SINGLE)
    group_size = effect.what.count("+") + effect.against.count("+")
    return list(KINDS).index(effect.kind), place, group_size, numbers, effect.what, effect.against


EffectPair = tuple[Effect, Experiment, Experiment]
"""The effect, the experiment without it and the experiment with it."""


def _compare(first: Experiment, second: Experiment) -> Iterator[EffectPair]:
    """The effects that a pair shows; none if it differs in more than one factor."""
    if first.fixed != second.fixed:
        return
    differing = [name for name in first.factors if not _equal(first.factors[name], second.factors[name])]
    if len(differing) != 1:
        return
    (name,) = differing
    for reference, changed in ((first, second), (second, first)):
        for effect in _factor_effects(name, reference.factors[name], changed.factors[name]):
            yield effect, reference, changed


def _equal(value: Any, other: Any) -> bool:
    return value is None or other is None or value == other


def _factor_effects(factor: str, reference: Any, changed: Any) -> Iterator[Effect]:
    """The effects of one value of a factor against another; none for the opposite direction."""
    if factor in TOWERS:
        yield from _sublayer_effects(factor, reference, changed)
    elif factor == "rank" and changed == 2 * reference:
        yield Effect(kind="rank", what="rank doubled", against="")
        yield Effect(kind="rank", what=f"rank {changed}", against=f"rank {reference}")
    elif factor == "model" and (_family(reference[0]), _family(changed[0])) == FAMILIES:
        yield Effect(kind="family", what=FAMILIES[1], against=FAMILIES[0])
    elif factor == "method" and _ORDER.index(reference) < _ORDER.index(changed):
        yield Effect(kind="method", what=changed, against=reference)


def _sublayer_effects(tower: str, reference: Any, changed: Any) -> Iterator[Effect]:
    if reference == "full":
        return
    if changed == "full":
        yield Effect(
            kind="full",
            what="qformer full",
            against=f"LoRA in {_join(tower, reference)}" if reference else "qformer frozen",
        )
    elif reference < changed:
        yield Effect(kind="added", what=f"{tower} {_join(tower, changed - reference)}", against="")
    elif len(reference) == len(changed) == 1:
        yield Effect(kind="instead", what=f"{tower} {_join(tower, changed)}", against="another alone")


def _join(tower: str, parts: frozenset[str]) -> str:
    return "+".join(part for part in TOWERS[tower] if part in parts)


_family = lru_cache(families.read_family)


def render(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Effects side by side for every data set, then notes."""
    rows = {Effect(e["kind"], e["what"], e["against"]): None for record in records for e in record["effects"]}
    order = sorted(rows, key=lambda effect: list(KINDS).index(effect.kind))  # stable: the rows of a kind stay in order
    table = Table(title="mean difference in test accuracy, points [95 %]", title_justify="left")
    table.add_column("effect of")
    table.add_column("against")
    for record in records:
        table.add_column(record["dataset"], justify="right")
        table.add_column("pairs", justify="right")
    by_folder = [{Effect(e["kind"], e["what"], e["against"]): e for e in record["effects"]} for record in records]
    for number, effect in enumerate(order):
        if number == 0 or order[number - 1].kind != effect.kind:
            table.add_section()
            table.add_row(KINDS[effect.kind], style="italic")
        cells: list[str] = []
        for effects in by_folder:
            cells += _cells(effects.get(effect))
        table.add_row(f"  {effect.what}", effect.against or ("without" if effect.kind == "added" else ""), *cells)
    return [table, *_notes(records)]


def _cells(effect: Mapping[str, Any] | None) -> tuple[str, str]:
    if effect is None or not effect["pairs"]:
        return "–", "0"
    ends = effect["interval"]
    interval = f" [{ends[0]:+.2f} – {ends[1]:+.2f}]" if ends else ""
    return f"{effect['mean']:+.2f}{interval}", str(effect["pairs"])


def _notes(records: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for record in records:
        pairs = sum(effect["pairs"] for effect in record["effects"])
        same = sum(effect["same_settings"] for effect in record["effects"])
        others = "; in the others learning rate, batch or epochs differ too" if same < pairs else ""
        yield (
            f"{record['dataset']}: {record['experiments']} experiments; {same} of {pairs} comparisons are between runs "
            f"with equal training settings{others}"
        )
        missing = [effect["what"] for effect in record["effects"] if effect["kind"] == "added" and not effect["pairs"]]
        if missing:
            yield f"{record['dataset']}: no two experiments differ in just {', '.join(missing)}"
