"""One experiment of a bank: its run folder, recipe and progress."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from torch import Tensor

from blipfit.recipe import Recipe
from blipfit.run import Run
from blipfit.training import checkpoint, plan
from blipfit.training.checkpoint import Progress


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
        return (*plan.bank_key(member.recipe), member.position)

    return [list(group) for _, group in groupby(sorted(members, key=key), key=key)]
