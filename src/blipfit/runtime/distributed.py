"""Several processes over one batch (`accelerate launch -m blipfit.cli train …`); one process is the ordinary case.

Each process holds the whole bank and takes a share of every batch's rows; gradients are summed, judgements gathered.
Only the main process writes and prints.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from blipfit.errors import UserError

T = TypeVar("T")


@lru_cache(maxsize=1)
def state() -> Any:
    """accelerate's view of this process: which of how many, on which device."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    return state().is_main_process


def device() -> torch.device:
    """This process's GPU, or the CPU where there is none."""
    return state().device


def chosen(name: str | None) -> torch.device:
    """The device of that name (`cpu`, `cuda`, `cuda:1`), or this process's own."""
    if name is None:
        return device()
    try:
        named = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: write cpu, cuda or cuda:0") from None
    if named.type == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no GPU is visible here; leave --device out to use the CPU")
    return named


def device_name(device: torch.device) -> str:
    """What a record says of it: the GPU's name, or the CPU with its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def shard(rows: Sequence[T]) -> Sequence[T]:
    """This process's rows of a batch."""
    return rows[state().process_index :: state().num_processes]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place."""
    if state().num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(items: list[T]) -> list[T]:
    """All processes' items."""
    if state().num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def main_first() -> AbstractContextManager[None]:
    """Within it the main process goes first, the others after it has left."""
    return state().main_process_first()


def wait() -> None:
    state().wait_for_everyone()
