"""Checkpoints: the state of all experiments of a bank, saved together.

Each experiment has its own files, `checkpoint/state-NUMBER.safetensors`, so that its folder can continue alone or in
another bank. The files of one save have the same id, and name the experiments that were saved with them. A kill between
two of the files leaves a save that only some experiments have; `find_common_saves` then uses the
previous save. All experiments still have it: old files are deleted only after every file of the new save is written.
"""

import copy
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit import run_folder
from blipfit.errors import UserError

KEPT_SAVES = 2
"""The newest save, and the one before in case the newest is damaged or incomplete."""


@dataclass
class Progress:
    """The position of an experiment, its losses and its best epoch.

    Data order, augmentation and dropout are functions of (seed, epoch, step), so no random state has to be saved.
    """

    epoch: int = 0
    step: int = 0
    """Optimizer steps of this epoch that are done."""
    updates: int = 0
    """Optimizer steps in all."""
    loss_sum: float = 0.0
    label_count: int = 0
    best_score: float = -math.inf
    """Score of the validation split at the best epoch; higher is better."""
    best_epoch: int = -1
    bad_epochs: int = 0
    done: bool = False
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Save:
    """One checkpoint file whose content has been checked; its tensors are read when they are needed."""

    path: Path
    number: int
    """1 for the first save of a run."""
    id: str
    """The same for all experiments that were saved together."""
    bank: tuple[str, ...]
    """Titles of all experiments of the bank, those included that had stopped before."""
    progress: Progress

    @property
    def position(self) -> tuple[bool, int, int]:
        """Whether the experiment is done, its epoch and its step."""
        return self.progress.done, self.progress.epoch, self.progress.step

    def read_tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors by group (values, best values, moments) and name."""
        tensors: dict[str, dict[str, Tensor]] = {}
        with safe_open(self.path, "pt") as file:
            for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
        return tensors


def write(
    folder: Path, save_id: str, bank: Sequence[str], progress: Progress, tensors: Mapping[str, Mapping[str, Tensor]]
) -> Save:
    """Write an experiment's file of a save; older files stay until `remove_old`.

    `tensors`: groups (values, best values, moments) of named tensors.
    """
    flat = {f"{group}/{name}": t.cpu() for group, named in tensors.items() for name, t in named.items()}
    header = json.dumps({"id": save_id, "bank": list(bank), "progress": asdict(progress)})
    digest = _digest(header, ((name, flat[name]) for name in sorted(flat)))
    number = max(map(_number, _files(folder)), default=0) + 1
    path = folder / f"state-{number:06d}.safetensors"
    with run_folder.replacing(path) as temporary:
        save_file(flat, temporary, {"header": header, "sha256": digest, "format": "pt"})
    return Save(path, number, save_id, tuple(bank), copy.deepcopy(progress))


def remove_old(folder: Path) -> None:
    """Remove all files but the newest ones; call it when the files of a save are written for the whole bank."""
    for path in _files(folder)[:-KEPT_SAVES]:
        path.unlink(missing_ok=True)


def remove_newer(folder: Path, number: int) -> None:
    """Remove the files after a save that the experiment continues from; 0 removes all."""
    for path in reversed(_files(folder)):
        if _number(path) > number:
            path.unlink(missing_ok=True)


def read_saves(folder: Path) -> tuple[list[Save], list[Path]]:
    """The saves in a folder whose digest matches their content, newest first, and the files that are damaged.

    Raises UserError if there are files, and all are damaged.
    """
    saves, damaged = [], []
    for path in reversed(_files(folder)):
        try:
            saves.append(_read_verified(path))
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            damaged.append((path, error))
    if damaged and not saves:
        path, reason = damaged[0]
        raise UserError(f"{path} is damaged ({reason}); delete {folder} to train this experiment from the start")
    return saves, [path for path, _ in damaged]


def find_common_saves(saves: Mapping[str, Sequence[Save]]) -> dict[str, Save | None]:
    """For each experiment the save to continue from, None for the start; those of one bank get the same save.

    `saves`: by title, newest first. If a kill or a damaged file left a save incomplete, all experiments of
    the bank fall back to the newest save that all of them have. One that has moved on since, alone or in another bank,
    or that is done, is no reason to fall back.
    """
    remaining = {title: list(own) for title, own in saves.items()}

    def fallback_index(title: str) -> int | None:
        """Index of the save that `title` must fall back to, its length for the start, or None if it need not."""
        own = remaining[title]
        for other in own[0].bank if own else ():
            if other == title or other not in remaining:
                continue
            latest = remaining[other][0] if remaining[other] else None
            if latest is None:
                if own[0].number == 1:
                    return len(own)
            elif not latest.progress.done and own[0].id not in [save.id for save in remaining[other]]:
                ids = [save.id for save in own]
                if latest.id in ids:
                    return ids.index(latest.id)
        return None

    changed = True
    while changed:
        changed = False
        for title in remaining:
            if position := fallback_index(title):
                remaining[title] = remaining[title][position:]
                changed = True
    return {title: own[0] if own else None for title, own in remaining.items()}


def read_bank(folder: Path) -> tuple[str, ...]:
    """Titles of the experiments that the newest readable file names as its bank; empty if there is none."""
    for path in reversed(_files(folder)):
        try:
            with safe_open(path, "pt") as file:
                return tuple(json.loads(file.metadata()["header"])["bank"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            continue
    return ()


def _files(folder: Path) -> list[Path]:
    """The checkpoint files in a folder, oldest first."""
    return sorted(folder.glob("state-*.safetensors"), key=_number)


def _number(path: Path) -> int:
    digits = path.stem.removeprefix("state-")
    return int(digits) if digits.isdecimal() else 0


def _read_verified(path: Path) -> Save:
    """Read a file and compare its content with its digest. Raises ValueError if they differ."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        header, names = metadata["header"], sorted(file.keys())
        if _digest(header, ((name, file.get_tensor(name)) for name in names)) != metadata["sha256"]:
            raise ValueError("its content is not what was written")
    values = json.loads(header)
    return Save(path, _number(path), values["id"], tuple(values["bank"]), Progress(**values["progress"]))


def _digest(header: str, tensors: Iterator[tuple[str, Tensor]]) -> str:
    """SHA-256 of the header and of all tensors with their names, types and shapes."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def new_save_id() -> str:
    """A new id for a save."""
    return os.urandom(16).hex()
