"""Checkpoint of one experiment: one file, so that it is complete or absent; independent of its bank."""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit import run_folder
from blipfit.errors import UserError

_FILE = "state.safetensors"


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


def save(folder: Path, progress: Progress, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a checkpoint. `tensors`: groups (values, best values, moments) of named tensors."""
    flat = {f"{group}/{name}": t.cpu() for group, named in tensors.items() for name, t in named.items()}
    with run_folder.replacing(folder / _FILE) as temporary:
        save_file(flat, temporary, {"progress": json.dumps(asdict(progress)), "format": "pt"})


def load(folder: Path) -> tuple[Progress, dict[str, dict[str, Tensor]]] | None:
    """Read a checkpoint, or return None if there is none. Raises UserError if it is damaged."""
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
