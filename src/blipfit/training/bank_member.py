"""One experiment of a bank (its run folder, recipe and progress), and which experiments can share a bank."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from blipfit.methods import PEFT
from blipfit.recipe import Recipe
from blipfit.run_folder import Inputs, Run
from blipfit.training import checkpoint
from blipfit.training.checkpoint import Progress, Save

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
    """An experiment of a bank.

    Members that are still trained stand at the same epoch and step; finished ones may join them for evaluation.
    """

    run: Run
    recipe: Recipe
    inputs: Inputs
    """What it is trained and evaluated with, by content."""
    progress: Progress = field(default_factory=Progress)
    save: Save | None = None
    """The checkpoint that it continues from, then the latest one."""

    @property
    def save_id(self) -> str:
        """Id of the latest checkpoint; empty before the first."""
        return self.save.id if self.save is not None else ""

    @property
    def position(self) -> tuple[bool, int, int]:
        """Whether it is done, its epoch and its step."""
        return self.progress.done, self.progress.epoch, self.progress.step


def load_checkpoints(members: Sequence[Member], report_damage: Callable[[Path, Path | None], None]) -> None:
    """Set every member's progress to the checkpoint that it continues from; all of a bank continue from one save.

    `report_damage(damaged, save)` is called for every damaged file, with the older file (None: the start) that is used
    instead. Raises UserError if a member has only damaged files.
    """
    saves, damaged = {}, {}
    for member in members:
        saves[member.recipe.title], damaged[member.recipe.title] = checkpoint.read_saves(member.run.checkpoint)
    common_saves = checkpoint.find_common_saves(saves)
    for member in members:
        save = member.save = common_saves[member.recipe.title]
        member.progress = Progress() if save is None else copy.deepcopy(save.progress)
        for path in damaged[member.recipe.title]:
            report_damage(path, None if save is None else save.path)


def remove_unused_checkpoints(members: Sequence[Member]) -> None:
    """Remove the files that are newer than what the members continue from; else the next kill would find them again."""
    for member in members:
        checkpoint.remove_newer(member.run.checkpoint, 0 if member.save is None else member.save.number)


def group_into_banks(members: Sequence[Member]) -> list[list[Member]]:
    """Groups that can share a bank: equal bank keys, equal position; inside a group the order of `members`.

    A member that is done joins the bank that it was trained in, so that they are evaluated together, as if the training
    had not been interrupted.
    """

    def key(member: Member) -> tuple[Any, ...]:
        return (*bank_key(member.recipe), member.position)

    active = sorted((member for member in members if not member.progress.done), key=key)
    banks = [list(group) for _, group in groupby(active, key=key)]
    # A bank's save names all its members, so one that trained longest knows most of the others: it is placed first.
    done = [member for member in members if member.progress.done]
    for member in sorted(done, key=lambda member: -member.progress.epoch):
        bank = next((bank for bank in banks if any(_was_saved_with(member, other) for other in bank)), None)
        if bank is None:
            banks.append([member])
        else:
            bank.append(member)
    order = {member.run.folder: number for number, member in enumerate(members)}
    banks = [sorted(bank, key=lambda member: order[member.run.folder]) for bank in banks]
    return sorted(banks, key=lambda bank: key(bank[0]))


def _was_saved_with(member: Member, other: Member) -> bool:
    """Whether the checkpoint of `other` names the member as one of its bank."""
    named = other.save is not None and member.recipe.title in other.save.bank
    return named and bank_key(member.recipe) == bank_key(other.recipe)
