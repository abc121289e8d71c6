"""Training and evaluation with several processes over the same batch (`blipfit train … --processes 4`).

Each process holds the whole bank and computes its share of every batch's rows; gradients are summed over the
processes, evaluation results are gathered. Only the main process writes files and prints. A single process is the
ordinary case. `launcher`, `accelerate launch` and torchrun start the processes.
"""

import atexit
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from blipfit.errors import UserError
from blipfit.runtime import launcher

T = TypeVar("T")
TIMEOUT = timedelta(days=2)
"""How long a process waits for the others, which may compute image features; the launcher sees that one is gone."""


@lru_cache(maxsize=1)
def state() -> Any:
    """accelerate's `PartialState` of this process: its index, the number of processes, and its device.

    Raises UserError if a launcher has started more processes on this machine than it has GPUs.
    """
    return _connect(cpu=not torch.cuda.is_available())


def _connect(cpu: bool) -> Any:
    """Connect the processes, through gloo with `cpu`, else through NCCL; only the first call has an effect."""
    from accelerate import PartialState

    processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    if not cpu and processes > (count := torch.cuda.device_count()):
        raise UserError(
            f"{processes} processes need {processes} GPUs, this machine has {count}; start {count} or fewer"
        )
    process_state = PartialState(cpu=cpu, timeout=TIMEOUT)
    if process_state.num_processes > 1:
        atexit.register(process_state.destroy_process_group)
    return process_state


def is_main() -> bool:
    """Whether this is the main process, the only one that writes files and prints."""
    return state().is_main_process


def device() -> torch.device:
    """This process's GPU, or the CPU where there is no GPU."""
    return state().device


def select_device(name: str | torch.device | None) -> torch.device:
    """The device with this name (`cpu`, `cuda`, `cuda:1`), or this process's own device if the name is None.

    With several processes, `cuda` is this process's own GPU. Raises UserError if the name is not a device, if this
    machine has no such device, or if several processes would share a GPU.
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
    if launcher.process_count() == 1:
        return selected_device
    if selected_device.index is not None and selected_device.type == "cuda":
        raise UserError(f"--device {name}: each of several processes has its own GPU; write cuda, or omit --device")
    return device() if selected_device.type == "cuda" else _connect(cpu=True).device


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


_exchanges, _is_alone = True, False
"""Whether tensors and items are exchanged; whether this process acts as if it were the only one."""


@contextmanager
def without_collectives(alone: bool = False) -> Iterator[None]:
    """Inside this context `all_reduce_sum`, `all_gather`, `any_process` and `variance` use this process's values only.

    For work that may run out of memory in one process: the others do not wait for it. `alone`: it also computes
    all rows, not its share.
    """
    global _exchanges, _is_alone
    previous = _exchanges, _is_alone
    _exchanges, _is_alone = False, alone
    try:
        yield
    finally:
        _exchanges, _is_alone = previous


def process_count() -> int:
    """The number of processes that share the rows of a batch and the batches of an evaluation."""
    return 1 if _is_alone else state().num_processes


def _is_exchanging() -> bool:
    return _exchanges and state().num_processes > 1


def own_rows() -> slice:
    """The rows of a batch that this process computes."""
    return slice(None) if _is_alone else slice(state().process_index, None, state().num_processes)


def own_share(rows: Sequence[T]) -> Sequence[T]:
    """Select this process's share of a batch's rows."""
    return rows[own_rows()]


def all_reduce_sum(tensor: Tensor) -> Tensor:
    """Sum a tensor of the same shape over all processes, in place; returns the tensor."""
    if _is_exchanging():
        torch.distributed.all_reduce(tensor)
    return tensor


def any_process(flag: bool) -> bool:
    """Whether the flag is true in any process; all processes must call this at the same point of their work."""
    if not _is_exchanging():
        return flag
    return bool(all_reduce_sum(torch.tensor(float(flag), device=state().device)) > 0)


def variance(rows: Tensor) -> Tensor:
    """The variance of all values of a tensor (unbiased) over the rows of all processes."""
    if not _is_exchanging():
        return rows.var()
    values = rows.double()
    count, total = all_reduce_sum(torch.stack([values.new_tensor(float(values.numel())), values.sum()]))
    return (all_reduce_sum((values - total / count).square().sum()) / (count - 1)).to(rows.dtype)


def all_gather(items: list[T]) -> list[T]:
    """Gather the items of all processes into a list, in the order of the processes."""
    if not _is_exchanging():
        return items
    from accelerate.utils import gather_object

    return gather_object(items)


def main_first() -> AbstractContextManager[None]:
    """A context that the main process runs first; the others wait until it has left the context."""
    return state().main_process_first()


def first_on_machine() -> AbstractContextManager[None]:
    """A context that one process of every machine runs first; the others of the machine wait until it has left it."""
    return state().local_main_process_first()


@contextmanager
def in_turn() -> Iterator[None]:
    """A context that the processes of a machine run one after the other."""
    index, count = state().local_process_index, int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    for _ in range(index):
        wait()
    try:
        yield
    finally:
        for _ in range(index, count):
            wait()


def wait() -> None:
    """Wait until all processes have reached this call."""
    state().wait_for_everyone()
