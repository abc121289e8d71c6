"""Matrix products in fp32 on a CPU through oneDNN, where torch's own would go through MKL.

Both compute the same in fp32. On a processor that is not Intel's MKL takes its AVX2 code, oneDNN takes AVX-512: large
products and the thin ones of LoRA are about twice as fast (`python -m benchmarks.products`). torch hands fp32 products
to oneDNN where it is allowed to round them to bfloat16. oneDNN makes use of that on some processors and computes in
fp32 on others; only on the latter, told apart by trying, is it allowed here. torch's own attention calls thousands of
tiny products, which oneDNN is slow at; so within `products` short attention is computed as batched products
(`attention`) and longer attention without oneDNN. Every other machine computes as torch does.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfit.runtime import memory

_lock = threading.Lock()
_inside = threading.local()
_entered = 0
"""How many contexts are open, of all threads."""
_active = False
"""Whether any is open. A bool of its own, because a compiled graph is valid for the value that it was traced with, and
the number would compile it again."""
_before = "none"
"""The setting that the outermost context found."""


def pays() -> bool:
    """Whether this machine has AVX-512 that MKL does not use, and oneDNN that does without rounding anything."""
    with _lock:
        return _pays()


@cache
def _pays() -> bool:
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and backends.mkldnn.enabled):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512" or _intel():
        return False
    try:
        before = _allow("bf16")
    except (AttributeError, RuntimeError):  # a torch before 2.9 has no such setting
        return False
    try:
        with torch.autocast("cpu", enabled=False):
            return all(_exact(size) for size in (32, 256))
    finally:
        _allow(before)


def _intel() -> bool:
    told = Path("/proc/cpuinfo")
    return told.exists() and "GenuineIntel" in told.read_text(encoding="utf-8", errors="ignore")


def _allow(precision: str) -> str:
    """How far torch may round what it gives to oneDNN, from now on; returns what held before."""
    setting = torch.backends.mkldnn.matmul
    before: str = setting.fp32_precision
    setting.fp32_precision = precision
    return before


def _exact(size: int) -> bool:
    """Whether products come out exact of whole numbers that fp32 holds and bfloat16 does not."""
    x, y, wanted = _whole_numbers(size)
    found = x @ y, torch.bmm(x[None], y[None]), torch.bmm(y.t()[None], x.t()[None]), F.linear(x, y.t())
    return all(bool((product == wanted).all()) for product in found)


def _whole_numbers(size: int) -> tuple[Tensor, Tensor, float]:
    """Two matrices `size × size` and what stands everywhere in their product; x has nine bits, bfloat16 eight."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x = (257 + 4 * torch.arange(size, **options).remainder(32)).expand(size, size).contiguous()
    y = torch.arange(size, **options).remainder(3).expand(size, size).t().contiguous()
    return x, y, float(x[0].double() @ y[:, 0].double())


@contextmanager
def products(device: str = "cpu") -> Iterator[None]:
    """Within it fp32 products on a CPU go through oneDNN where that is faster; forward and backward each need it.

    `device`: the type of device that computes; on any other than a CPU nothing changes.
    """
    if device != "cpu" or not pays():
        yield
        return
    memory.keep_freed()  # batched attention would pay for the pages of its scores every time
    _inside.depth = getattr(_inside, "depth", 0) + 1
    _enter(1)
    try:
        yield
    finally:
        _inside.depth -= 1
        _enter(-1)


def in_products(device: str = "cpu") -> bool:
    """Whether this thread is within `products` and they go through oneDNN."""
    if device != "cpu":
        return False
    if torch.compiler.is_compiling():  # a graph is traced once, within `products` where they pay
        return _active
    return bool(getattr(_inside, "depth", 0))


@contextmanager
def plain_products(device: str = "cpu") -> Iterator[None]:
    """Within it products are torch's own again, for what oneDNN is slow at; outside `products` it does nothing.

    A compiled graph cannot change the setting midway: while one is traced it does nothing either.
    """
    if not in_products(device) or torch.compiler.is_compiling():
        yield
        return
    with _lock:
        _allow(_before)
    try:
        yield
    finally:
        with _lock:
            _allow("bf16")  # this thread is inside


def _enter(change: int) -> None:
    """torch's setting is the process's: it is changed while any thread is inside."""
    global _entered, _active, _before
    with _lock:
        if _entered == 0:
            _before = _allow("bf16")
        _entered += change
        _active = _entered > 0
        if _entered == 0:
            _allow(_before)
