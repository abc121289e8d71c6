"""The published grid as recipes: 64 experiments per data set, the baselines, and ten explorations.

Sources: Kim et al., "Parameter-Efficient Fine-tuning of InstructBLIP for Visual Reasoning Tasks" (ENLSP workshop at
NeurIPS 2023) and Kim et al., "Towards Efficient Visual-Language Alignment of the Q-Former for Visual Reasoning Tasks"
(Findings of EMNLP 2024, pages 15155-15165); and their 128 configuration files, which this module replaces by
arithmetic.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from blipfit.data_sets import DATA_SETS
from blipfit.errors import UserError
from blipfit.recipe import (
    AdapterConfig,
    DataConfig,
    DistillationConfig,
    EvaluationConfig,
    Family,
    LanguageSublayer,
    ModelConfig,
    QFormerSublayer,
    Recipe,
    TrainingConfig,
)

RANKS = (1, 2, 4, 8)
MODELS: dict[Family, str] = {
    "t5": "Salesforce/instructblip-flan-t5-xl",
    "vicuna": "Salesforce/instructblip-vicuna-7b",
}
_SUFFIXES: dict[Family, str] = {"t5": "", "vicuna": "-vicuna"}
BASELINES: dict[str, Family] = {"baseline": "t5", "baseline-vicuna": "vicuna"}

RECOVERY = "recover"
SHRINK_RECORD = "shrink.json"
"""File that `blipfit shrink` writes: the original model, and which parts of it remain."""

REGIONS = ("qformer", "first", "middle", "last", "all")
"""Explorations: LoRA in the whole Q-Former, and in none, the first, middle or last third, or all blocks of the language
model."""
EXPLORATIONS: dict[str, tuple[Family, str]] = {
    f"explore-{region}{suffix}": (family, region) for family, suffix in _SUFFIXES.items() for region in REGIONS
}
BLOCKS: dict[str, tuple[int, ...]] = {
    "Salesforce/instructblip-flan-t5-xl": (24, 24),
    "Salesforce/instructblip-flan-t5-xxl": (24, 24),
    "Salesforce/instructblip-vicuna-7b": (32,),
    "Salesforce/instructblip-vicuna-13b": (40,),
    "tiny-t5": (3, 2),
    "tiny-vicuna": (4,),
}
"""Number of blocks in each stack of the language model (T5: encoder, decoder)."""


@dataclass(frozen=True, slots=True)
class GridPlacement:
    """A placement: which sublayers of the language model and of the Q-Former are adapted."""

    llm: tuple[LanguageSublayer, ...]
    qformer: Literal["full"] | tuple[QFormerSublayer, ...]


_LLM, _QFORMER = ("attn", "ffn"), ("self_attn", "cross_attn", "ffn")
PLACEMENTS = (
    GridPlacement(("ffn",), "full"),
    GridPlacement(("attn",), "full"),
    GridPlacement(_LLM, "full"),
    GridPlacement((), ("ffn",)),
    GridPlacement((), ("self_attn",)),
    GridPlacement((), ("cross_attn",)),
    GridPlacement((), _QFORMER),
    GridPlacement(_LLM, _QFORMER),
)
IDS = range(1, 2 * len(PLACEMENTS) * len(RANKS) + 1)

# Learning rates that differ from the rule (2e-5 with the Q-Former fully trained, 5e-4 elsewhere).
_LEARNING_RATES: dict[str, dict[int, float]] = {
    "scienceqa": dict.fromkeys((19, 22, 29, 31, 32, 61), 1e-4),
    "iconqa": dict.fromkeys((15, 26, 31, 61, 62, 63), 1e-4) | dict.fromkeys((5, 8, 9, 12, 33, 40, 42), 1e-5),
}
_MAX_EPOCHS: dict[str, dict[int, int]] = {"iconqa": {6: 10, 38: 10}}

# The miniatures on icons have no published recipe: settings with which all 64 learn in minutes (docs/grid.md). With a
# fully trained Q-Former, a higher rate destroys what it has learned before.
_ICONS_RATE, _ICONS_RATE_FULL, _ICONS_EPOCHS = 2e-3, 5e-4, 3


def decode_id(experiment: int) -> tuple[Family, GridPlacement, int]:
    """Language-model family, placement and rank of an experiment. Raises ValueError outside 1–64."""
    if experiment not in IDS:
        raise ValueError(f"there is no experiment {experiment}; the grid has 1 to {IDS[-1]}")
    half, index = divmod(experiment - 1, len(PLACEMENTS) * len(RANKS))
    row, rank = divmod(index, len(RANKS))
    return ("t5", "vicuna")[half], PLACEMENTS[row], RANKS[rank]


def family(experiment: str) -> Family | None:
    """Language-model family of an experiment of the grid, a baseline or an exploration; None for any other name."""
    if experiment in BASELINES:
        return BASELINES[experiment]
    if experiment in EXPLORATIONS:
        return EXPLORATIONS[experiment][0]
    return decode_id(int(experiment))[0] if experiment.isdecimal() and int(experiment) in IDS else None


def trainable() -> list[str]:
    """Data sets that the grid has recipes for."""
    return [name for name, data_set in DATA_SETS.items() if data_set.trains]


def recipe(dataset: str, experiment: int | str, model: str | None = None) -> Recipe:
    """The recipe of an experiment in the grid, of a baseline, an exploration or a recovery.

    `experiment` is 1–64, `baseline` (Flan-T5-XL), `baseline-vicuna`, `recover` or a name in `EXPLORATIONS`. `model`
    replaces the published checkpoint; `tiny` is the miniature of the experiment's family. Data sets without published
    experiments follow the grid's rules without its exceptions; a miniature on `icons` has its own rates and epochs.
    Raises UserError if the data set or the experiment does not exist.
    """
    if experiment in EXPLORATIONS:
        return exploration_recipe(str(experiment), dataset, model)
    if experiment == RECOVERY:
        return recovery_recipe(dataset, model)
    data_set = DATA_SETS.get(dataset)
    if data_set is None or not data_set.trains:
        raise UserError(f"the grid has no data set {dataset!r}; known: {', '.join(trainable())}")
    if experiment in BASELINES:
        number, family, row, rank = 0, BASELINES[str(experiment)], GridPlacement((), "full"), 8
    else:
        number = _number(experiment)
        family, row, rank = decode_id(number)
    full, name = row.qformer == "full", model_name(family, model)
    rate, epochs = 2e-5 if full else 5e-4, 15
    if dataset == "icons" and name == model_name(family, "tiny"):
        rate, epochs = _ICONS_RATE_FULL if full else _ICONS_RATE, _ICONS_EPOCHS
    return Recipe(
        experiment=str(number or experiment),
        model=ModelConfig(name=name),
        data=DataConfig(
            name=dataset, prompt=data_set.prompt, images="stored" if data_set.mirrored_matters else "shared"
        ),
        adapter=AdapterConfig(qformer=row.qformer, llm=row.llm, rank=rank, alpha=8),
        training=TrainingConfig(
            batch_size=16 if family == "t5" else 8,
            accumulation=1 if family == "t5" else 2,
            learning_rate=_LEARNING_RATES.get(dataset, {}).get(number, rate),
            max_epochs=_MAX_EPOCHS.get(dataset, {}).get(number, epochs),
        ),
        evaluation=EvaluationConfig(method="generation" if data_set.open else "ranking"),
    )


def exploration_recipe(name: str, dataset: str = "rewardbench", model: str | None = None) -> Recipe:
    """An exploration: LoRA of rank 8 in the whole Q-Former and in the named part of the language model.

    A `model` that is neither published nor a miniature is assumed to have as many blocks as its family's published one.
    Raises UserError if there is no such exploration.
    """
    if name not in EXPLORATIONS:
        raise UserError(f"there is no exploration {name!r}; known: {', '.join(EXPLORATIONS)}")
    family, region = EXPLORATIONS[name]
    template = recipe(dataset, 28 if family == "t5" else 60, model)
    depths = BLOCKS.get(template.model.name, BLOCKS[MODELS[family]])
    adapter = AdapterConfig(
        qformer=_QFORMER,
        llm=() if region == "qformer" else _LLM,
        llm_layers=None if region in ("qformer", "all") else _third(depths, region),
        rank=8,
        alpha=8,
    )
    training = TrainingConfig(batch_size=8, accumulation=2, learning_rate=5e-4 if region == "qformer" else 1e-4)
    return template.model_copy(update={"experiment": name, "adapter": adapter, "training": training})


def recovery_recipe(dataset: str, model: str | None) -> Recipe:
    """Recovery of a shrunk Q-Former: all of it is trained to give the visual tokens of the original, without labels.

    `model` is a folder that `blipfit shrink` wrote; the original named there is the teacher. Batches are large, because
    the language model is not used. Raises UserError if `model` is no such folder.
    """
    original = shrink_record(model).get("from") if model not in (None, "tiny", *BLOCKS) else None
    if original is None:
        raise UserError(
            f"{RECOVERY} needs a folder that `blipfit shrink` made: --model DIR (with {SHRINK_RECORD} in it)"
        )
    template = recipe(dataset, "baseline", model)
    epochs = template.training.max_epochs
    training = TrainingConfig(batch_size=64, learning_rate=1e-3, max_epochs=epochs, patience=epochs, dropout=False)
    distillation = DistillationConfig(teacher=original, labels=0, answers=0)
    return template.model_copy(update={"experiment": RECOVERY, "training": training, "distillation": distillation})


def shrink_record(model: str | None) -> dict[str, Any]:
    """The record that `blipfit shrink` wrote into a model's folder; empty if there is none."""
    try:
        record = json.loads((Path(model or "").expanduser() / SHRINK_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _third(depths: Sequence[int], region: str) -> tuple[int, ...]:
    """The first, middle or last third of the blocks of every stack, at least one, counted through all stacks."""
    blocks: list[int] = []
    start = 0
    for depth in depths:
        count = max(1, round(depth / 3))
        offset = {"first": 0, "middle": (depth - count) // 2, "last": depth - count}[region]
        blocks += range(start + offset, start + offset + count)
        start += depth
    return tuple(blocks)


def model_name(family: Family, model: str | None) -> str:
    """The checkpoint to load: the published one if `model` is None, the family's miniature for `tiny`, or `model`."""
    if model is None:
        return MODELS[family]
    return f"tiny-{family}" if model == "tiny" else model


def recipes(dataset: str) -> Iterator[Recipe]:
    """All 64 experiments of a data set, in order."""
    return (recipe(dataset, number) for number in IDS)


def parse_experiments(text: str) -> list[str]:
    """Experiment names in `1-32`, `13,15,28`, `all` (1–64), `baseline` or any such list.

    Raises UserError for anything else.
    """
    names: list[str] = []
    for part in text.replace(" ", "").split(","):
        low, dash, high = part.partition("-")
        if part == "all":
            names += map(str, IDS)
        elif part in (*BASELINES, *EXPLORATIONS, RECOVERY):
            names.append(part)
        elif dash and low.isdigit() and high.isdigit() and int(low) <= int(high) <= IDS[-1]:
            names += map(str, range(int(low), int(high) + 1))
        elif part.isdigit():
            names.append(part)
        else:
            known = f"write 1-32, 13,15,28, all, {', '.join(BASELINES)} or {RECOVERY}"
            raise UserError(f"{text!r} names no experiments: {part!r} is not understood; {known}")
    return list(dict.fromkeys(names))


def _number(experiment: int | str) -> int:
    try:
        number = int(experiment)
        decode_id(number)
    except ValueError:
        raise UserError(
            f"there is no experiment {experiment!r}; the grid has 1 to {IDS[-1]} and {', '.join(BASELINES)}, "
            f"and there are {RECOVERY} and {', '.join(EXPLORATIONS)}"
        ) from None
    return number
