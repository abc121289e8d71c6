"""Which experiments can share a bank, and in which order batches come."""

import hashlib
import random
from collections.abc import Iterator, Sequence
from typing import Any

from blipfit.methods import PEFT
from blipfit.recipe import Recipe, TrainingConfig

# What may differ inside a bank; everything else is shared by its members.
_OWN = {"learning_rate", "weight_decay", "betas", "max_epochs", "patience"}


def bank_key(recipe: Recipe) -> tuple[Any, ...]:
    """Experiments with equal keys see the same batches through the same backbone, so they can share a bank."""
    shared = recipe.training.model_dump(exclude=_OWN)
    return (
        recipe.model.name,
        recipe.model.revision or "",
        recipe.model.quantization,
        recipe.data.model_dump_json(),
        repr(sorted(shared.items())),
        recipe.evaluation.model_dump_json(),
        recipe.distillation.model_dump_json(),
        recipe.performance.model_dump_json(),
        recipe.adapter.qformer == "full",
        recipe.adapter.method,
        recipe.title if recipe.adapter.method in PEFT else "",  # peft's layers hold one experiment
    )


# So many batches are sorted by length together: enough that rows of a batch are nearly alike, few enough that a
# batch still mixes what an epoch's order brings together.
GROUPED = 8


def effective_batches(lengths: Sequence[int], training: TrainingConfig, epoch: int) -> list[list[int]]:
    """Shuffled question indices, one list an optimizer step; the last short batch is dropped.

    `lengths` are the questions' text tokens. A function of them, the seed and the epoch alone: every experiment of a
    bank, and the same experiment by itself, sees the same batches. Inside a batch the shorter come first, so that
    micro-batches have less padding.
    """
    order = list(range(len(lengths)))
    rng = random.Random(f"{training.seed}/{epoch}")
    rng.shuffle(order)
    size = training.batch_size * training.accumulation
    order = order[: len(order) // size * size]
    # Sorted are the questions of a step, or of several: rows of a forward pass are then of like length.
    together = (GROUPED if training.group_by_length else 1) * size
    batches = []
    for start in range(0, len(order), together):
        group = sorted(order[start : start + together], key=lengths.__getitem__)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    if training.group_by_length:
        rng.shuffle(batches)
    return batches


def total_steps(count: int, training: TrainingConfig) -> int:
    """Optimiser steps of the longest possible training on that many questions."""
    return count // (training.batch_size * training.accumulation) * training.max_epochs


def micro_batches(batch: Sequence[int], training: TrainingConfig) -> Iterator[Sequence[int]]:
    """The forward passes of one optimizer step."""
    for start in range(0, len(batch), training.batch_size):
        yield batch[start : start + training.batch_size]


def step_seed(seed: int, epoch: int, step: int, micro: int) -> int:
    """Seed of the dropout of one forward pass, so that a resumed run draws the same noise."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}/{micro}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
