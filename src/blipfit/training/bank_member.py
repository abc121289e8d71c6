"""One experiment of a bank (its run folder, recipe and progress), and which experiments can share a bank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from blipfit.methods import PEFT
from blipfit.recipe import Recipe
from blipfit.run_folder import Run
from blipfit.training import checkpoint
from blipfit.training.checkpoint import Progress

# Training fields that may differ inside a bank; everything else is equal for its members.
_PER_EXPERIMENT = {"learning_rate", "weight_decay", "betas", "max_epochs", "patience"}


def bank_key(recipe: Recipe) -> tuple[Any, ...]:
    """Experiments with equal keys see the same batches through the same backbone, so they can share a bank."""
    shared = recipe.training.model_dump(exclude=_PER_EXPERIMENT)
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


@dataclass
class Member:
    """An experiment that is trained; members of a bank stand at the same epoch and step."""

    run: Run
    recipe: Recipe
    data_sha256: str
    """Hash of the questions that it is trained and evaluated on."""
    progress: Progress = field(default_factory=Progress)
    checkpoint: Mapping[str, Mapping[str, Tensor]] | None = None
    """Tensors to continue from, by group (see `checkpoint.save`); None after they are restored, or for a new run."""

    def load_checkpoint(self) -> None:
        """Read the run's progress and tensors, if it was interrupted. Raises UserError if they are damaged."""
        saved = checkpoint.load(self.run.checkpoint)
        if saved is not None:
            self.progress, self.checkpoint = saved

    @property
    def position(self) -> tuple[bool, int, int]:
        """Whether it is done, its epoch and its step."""
        return self.progress.done, self.progress.epoch, self.progress.step


def group_into_banks(members: Sequence[Member]) -> list[list[Member]]:
    """Groups that can share a bank: equal bank keys, equal position."""

    def key(member: Member) -> tuple[Any, ...]:
        return (*bank_key(member.recipe), member.position)

    return [list(group) for _, group in groupby(sorted(members, key=key), key=key)]
