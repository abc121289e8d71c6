"""Resume state of one experiment: one file, so it is whole or absent; independent of the bank it was in."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit import run
from blipfit.errors import UserError

_FILE = "state.safetensors"


@dataclass
class Progress:
    """Where an experiment stands.

    The data order, augmentation and dropout are functions of (seed, epoch, step), so a position is all there is to
    remember of them.
    """

    epoch: int = 0
    step: int = 0
    """Optimiser steps done in this epoch."""
    updates: int = 0
    """Optimiser steps done in all."""
    loss_sum: float = 0.0
    label_count: int = 0
    best_score: float = -math.inf
    """Of the validation split, the better the higher."""
    best_epoch: int = -1
    bad_epochs: int = 0
    done: bool = False
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)


def save(folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write the state; `tensors` groups (values, best, moments) of named tensors."""
    flat = {f"{group}/{name}": t.cpu() for group, named in tensors.items() for name, t in named.items()}
    with run.replacing(folder / _FILE) as temporary:
        save_file(flat, temporary, {"progress": json.dumps(asdict(progress)), "format": "pt"})


def load(folder: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """Read the state back, or None where there is none."""
    path = folder / _FILE
    if not path.exists():
        return None
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        with safe_open(path, "pt") as file:
            progress = Progress(**json.loads(file.metadata()["progress"]))
            for key in file.keys():  # noqa: SIM118 (a handle, not a dict)
                group, _, name = key.partition("/")
                tensors.setdefault(group, {})[name] = file.get_tensor(key)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is damaged ({error}); delete {folder} to train this experiment from the start"
        ) from None
    return progress, tensors
