"""Training and evaluation with several processes over the same batch (`accelerate launch -m blipfit train …`).

Each process holds the whole bank and computes its share of every batch's rows; gradients are summed over the
processes, evaluation results are gathered. Only the main process writes files and prints. A single process is the
ordinary case.
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
    """accelerate's `PartialState` of this process: its index, the number of processes, and its device."""
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())


def is_main() -> bool:
    """Whether this is the main process, the only one that writes files and prints."""
    return state().is_main_process


def device() -> torch.device:
    """This process's GPU, or the CPU where there is no GPU."""
    return state().device


def select_device(name: str | torch.device | None) -> torch.device:
    """The device with this name (`cpu`, `cuda`, `cuda:1`), or this process's own device if the name is None.

    Raises UserError if the name is not a device, or if this machine has no such device.
    """
    if name is None:
        return device()
    try:
        selected_device = torch.device(name)
    except (RuntimeError, TypeError):
        raise UserError(f"--device {name!s:.100}: not a device; write cpu, cuda or cuda:0") from None
    if selected_device.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {name}: no GPU is available on this machine; omit --device to use the CPU")
        if (selected_device.index or 0) >= (count := torch.cuda.device_count()):
            raise UserError(f"--device {name}: this machine has {count} GPUs; the last is cuda:{count - 1}")
    elif not _has_memory(selected_device):
        raise UserError(f"--device {name}: this machine has no such device; write cpu, cuda or cuda:0")
    return selected_device


def _has_memory(device: torch.device) -> bool:
    """Whether a tensor with values can be made on a device that is no GPU of CUDA."""
    if device.type == "meta" or (device.type == "cpu" and device.index):
        return False
    try:
        return torch.ones(1, device=device).item() == 1
    except (RuntimeError, AssertionError, ImportError, NotImplementedError, AttributeError):
        return False


def device_name(device: torch.device) -> str:
    """Describe a device for a result file: the GPU's name, or the CPU with its number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {torch.get_num_threads()} threads"


def shard(rows: Sequence[T]) -> Sequence[T]:
    """Select this process's share of a batch's rows."""
    return rows[state().process_index :: state().num_processes]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor of the same shape over all processes, in place; returns the tensor."""
    if state().num_processes > 1:
        torch.distributed.all_reduce(tensor)
    return tensor


def all_gather(items: list[T]) -> list[T]:
    """Gather the items of all processes into a list, in the order of the processes."""
    if state().num_processes == 1:
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def main_first() -> AbstractContextManager[None]:
    """A context that the main process runs first; the others wait until it has left the context."""
    return state().main_process_first()


def wait() -> None:
    """Wait until all processes have reached this call."""
    state().wait_for_everyone()
