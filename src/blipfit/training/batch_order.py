"""The order of batches: question indices of every step, and the seed of its dropout noise."""

import hashlib
import random
from collections.abc import Iterator, Sequence

from blipfit.recipe import TrainingConfig

GROUPED_BATCHES = 8
"""So many batches are sorted by length together: enough for little padding, few enough that batches stay mixed."""


def effective_batches(lengths: Sequence[int], training: TrainingConfig, epoch: int) -> list[list[int]]:
    """Shuffled question indices, one list per optimizer step; an incomplete last batch is dropped.

    `lengths`: text tokens of each question. The result depends only on them, the seed and the epoch, so every
    experiment of a bank, and the same experiment alone, has the same batches. Inside a batch short questions come
    first, so that micro-batches have less padding.
    """
    order = list(range(len(lengths)))
    rng = random.Random(f"{training.seed}/{epoch}")
    rng.shuffle(order)
    size = training.batch_size * training.accumulation
    order = order[: len(order) // size * size]
    group_size = (GROUPED_BATCHES if training.group_by_length else 1) * size
    batches = []
    for start in range(0, len(order), group_size):
        group = sorted(order[start : start + group_size], key=lengths.__getitem__)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    if training.group_by_length:
        rng.shuffle(batches)
    return batches


def total_steps(count: int, training: TrainingConfig) -> int:
    """Optimizer steps of the longest possible training on `count` questions."""
    return count // (training.batch_size * training.accumulation) * training.max_epochs


def micro_batches(batch: Sequence[int], training: TrainingConfig) -> Iterator[Sequence[int]]:
    """The question indices of each forward pass of one optimizer step."""
    for start in range(0, len(batch), training.batch_size):
        yield batch[start : start + training.batch_size]


def step_seed(seed: int, epoch: int, step: int, micro: int) -> int:
    """Seed of the dropout noise of one forward pass, so that a continued run has the same noise."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{step}/{micro}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
