"""The published grid: 64 experiments a data set, and the baseline beside it, as recipes; and ten explorations.

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
_ENDS: dict[Family, str] = {"t5": "", "vicuna": "-vicuna"}
BASELINES: dict[str, Family] = {"baseline": "t5", "baseline-vicuna": "vicuna"}

RECOVERY = "recover"
SHRINK_RECORD = "shrink.json"
"""What `blipfit shrink` leaves in a folder: what the model was made from, and what of it was kept."""

PLACES = ("qformer", "first", "middle", "last", "all")
"""Explorations: LoRA in the whole Q-Former and in no, the first, middle, last third, or all blocks of the language
model."""
EXPLORATIONS: dict[str, tuple[Family, str]] = {
    f"explore-{place}{end}": (family, place) for family, end in _ENDS.items() for place in PLACES
}
BLOCKS: dict[str, tuple[int, ...]] = {
    "Salesforce/instructblip-flan-t5-xl": (24, 24),
    "Salesforce/instructblip-flan-t5-xxl": (24, 24),
    "Salesforce/instructblip-vicuna-7b": (32,),
    "Salesforce/instructblip-vicuna-13b": (40,),
    "tiny-t5": (3, 2),
    "tiny-vicuna": (4,),
}
"""Blocks of the language models' stacks (T5: encoder, decoder)."""


@dataclass(frozen=True, slots=True)
class Row:
    """A placement: which sublayers of the language model and of the Q-Former are adapted."""

    llm: tuple[LanguageSublayer, ...]
    qformer: Literal["full"] | tuple[QFormerSublayer, ...]


_LLM, _QFORMER = ("attn", "ffn"), ("self_attn", "cross_attn", "ffn")
ROWS = (
    Row(("ffn",), "full"),
    Row(("attn",), "full"),
    Row(_LLM, "full"),
    Row((), ("ffn",)),
    Row((), ("self_attn",)),
    Row((), ("cross_attn",)),
    Row((), _QFORMER),
    Row(_LLM, _QFORMER),
)
IDS = range(1, 2 * len(ROWS) * len(RANKS) + 1)

# Learning rates that differ from the rule (2e-5 with the Q-Former fully trained, 5e-4 elsewhere).
_LEARNING_RATES: dict[str, dict[int, float]] = {
    "scienceqa": dict.fromkeys((19, 22, 29, 31, 32, 61), 1e-4),
    "iconqa": dict.fromkeys((15, 26, 31, 61, 62, 63), 1e-4) | dict.fromkeys((5, 8, 9, 12, 33, 40, 42), 1e-5),
}
_MAX_EPOCHS: dict[str, dict[int, int]] = {"iconqa": {6: 10, 38: 10}}

# The miniatures on drawn pictures have nothing published to follow: what teaches all 64 in minutes (docs/grid.md). With
# the Q-Former fully trained a higher rate loses what it knew.
_DRAWN_RATE, _DRAWN_RATE_FULL, _DRAWN_EPOCHS = 2e-3, 5e-4, 3


def locate(experiment: int) -> tuple[Family, Row, int]:
    """Language-model family, placement and rank of an experiment; ValueError outside 1–64."""
    if experiment not in IDS:
        raise ValueError(f"there is no experiment {experiment}; the grid has 1 to {IDS[-1]}")
    half, index = divmod(experiment - 1, len(ROWS) * len(RANKS))
    row, rank = divmod(index, len(RANKS))
    return ("t5", "vicuna")[half], ROWS[row], RANKS[rank]


def trainable() -> list[str]:
    """Data sets that the grid has recipes for."""
    return [name for name, one in DATA_SETS.items() if one.trains]


def recipe(dataset: str, experiment: int | str, model: str | None = None) -> Recipe:
    """The published recipe of an experiment of the grid, or of a baseline; or an exploration, or a recovery.

    `experiment` is 1–64, `baseline` (Flan-T5-XL), `baseline-vicuna`, `recover` or a name in `EXPLORATIONS`. `model`
    replaces the published checkpoint; `tiny` is the miniature of the experiment's family. Data sets that were not
    published follow the rules without the exceptions; a miniature on `icons` has rates and a length of its own.
    """
    if experiment in EXPLORATIONS:
        return explore(str(experiment), dataset, model)
    if experiment == RECOVERY:
        return recover(dataset, model)
    asked = DATA_SETS.get(dataset)
    if asked is None or not asked.trains:
        raise UserError(f"the grid has no data set {dataset!r}; known: {', '.join(trainable())}")
    if experiment in BASELINES:
        number, family, row, rank = 0, BASELINES[str(experiment)], Row((), "full"), 8
    else:
        number = _number(experiment)
        family, row, rank = locate(number)
    full, name = row.qformer == "full", model_name(family, model)
    rate, epochs = 2e-5 if full else 5e-4, 15
    if dataset == "icons" and name == model_name(family, "tiny"):
        rate, epochs = _DRAWN_RATE_FULL if full else _DRAWN_RATE, _DRAWN_EPOCHS
    return Recipe(
        experiment=str(number or experiment),
        model=ModelConfig(name=name),
        data=DataConfig(name=dataset, prompt=asked.prompt, images="stored" if asked.mirrored_matters else "shared"),
        adapter=AdapterConfig(qformer=row.qformer, llm=row.llm, rank=rank, alpha=8),
        training=TrainingConfig(
            batch_size=16 if family == "t5" else 8,
            accumulation=1 if family == "t5" else 2,
            learning_rate=_LEARNING_RATES.get(dataset, {}).get(number, rate),
            max_epochs=_MAX_EPOCHS.get(dataset, {}).get(number, epochs),
        ),
        evaluation=EvaluationConfig(method="generation" if asked.open else "ranking"),
    )


def explore(name: str, dataset: str = "rewardbench", model: str | None = None) -> Recipe:
    """An exploration: LoRA of rank 8 in the whole Q-Former and in the named part of the language model.

    The numbers of blocks are those of the published checkpoint or miniature; a `model` that is none of them is taken
    to be as deep as its family's published one.
    """
    if name not in EXPLORATIONS:
        raise UserError(f"there is no exploration {name!r}; known: {', '.join(EXPLORATIONS)}")
    family, place = EXPLORATIONS[name]
    like = recipe(dataset, 28 if family == "t5" else 60, model)
    depths = BLOCKS.get(like.model.name, BLOCKS[MODELS[family]])
    adapter = AdapterConfig(
        qformer=_QFORMER,
        llm=() if place == "qformer" else _LLM,
        llm_layers=None if place in ("qformer", "all") else _third(depths, place),
        rank=8,
        alpha=8,
    )
    training = TrainingConfig(batch_size=8, accumulation=2, learning_rate=5e-4 if place == "qformer" else 1e-4)
    return like.model_copy(update={"experiment": name, "adapter": adapter, "training": training})


def recover(dataset: str, model: str | None) -> Recipe:
    """A shrunk Q-Former learns to see as the original does: all of it trained, without labels or dropout.

    `model` is a folder that `blipfit shrink` made; the original named there teaches. Batches are large, because the
    language model has no part in it, and training goes on to the end.
    """
    original = shrink_record(model).get("from") if model not in (None, "tiny", *BLOCKS) else None
    if original is None:
        raise UserError(
            f"{RECOVERY} needs a folder that `blipfit shrink` made: --model DIR (with {SHRINK_RECORD} in it)"
        )
    like = recipe(dataset, "baseline", model)
    rounds = like.training.max_epochs
    training = TrainingConfig(batch_size=64, learning_rate=1e-3, max_epochs=rounds, patience=rounds, dropout=False)
    teaching = DistillationConfig(teacher=original, labels=0, answers=0)
    return like.model_copy(update={"experiment": RECOVERY, "training": training, "distillation": teaching})


def shrink_record(model: str | None) -> dict[str, Any]:
    """What `blipfit shrink` left in a model's folder; nothing where it did not make it."""
    try:
        record = json.loads((Path(model or "").expanduser() / SHRINK_RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _third(depths: Sequence[int], place: str) -> tuple[int, ...]:
    """The first, middle or last third of the blocks of every stack, at least one, counted through all stacks."""
    chosen: list[int] = []
    start = 0
    for depth in depths:
        count = max(1, round(depth / 3))
        offset = {"first": 0, "middle": (depth - count) // 2, "last": depth - count}[place]
        chosen += range(start + offset, start + offset + count)
        start += depth
    return tuple(chosen)


def model_name(family: Family, model: str | None) -> str:
    """The checkpoint to load: the published one, the family's miniature for `tiny`, or what was asked for."""
    if model is None:
        return MODELS[family]
    return f"tiny-{family}" if model == "tiny" else model


def recipes(dataset: str) -> Iterator[Recipe]:
    """All 64 experiments of a data set, in order."""
    return (recipe(dataset, number) for number in IDS)


def _number(experiment: int | str) -> int:
    try:
        number = int(experiment)
        locate(number)
    except ValueError:
        raise UserError(
            f"there is no experiment {experiment!r}; the grid has 1 to {IDS[-1]} and {', '.join(BASELINES)}, "
            f"and there are {RECOVERY} and {', '.join(EXPLORATIONS)}"
        ) from None
    return number
