"""Matrix products in fp32 on a CPU through oneDNN, where torch itself would use MKL.

Both compute the same in fp32. On processors that are not Intel's, MKL uses its AVX2 code and oneDNN uses AVX-512:
large products and the thin products of LoRA are about twice as fast (`python -m benchmarks.products`).

torch uses oneDNN for fp32 products only where it is allowed to round them to bfloat16. On some processors oneDNN then
does round, on others it still computes in fp32. It is used here only on the latter, which a test product tells apart.

torch's own attention computes thousands of tiny products, for which oneDNN is slow. Inside `onednn_products`, short
attention is therefore computed as batched products (`attention`), and longer attention without oneDNN. On every other
machine nothing changes.
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

from blipfit.runtime import cpu_memory

_lock = threading.Lock()
_thread_state = threading.local()
"""Attribute `depth`: the number of open `onednn_products` contexts of this thread."""
_open_contexts = 0
"""Number of open `onednn_products` contexts in all threads."""
_active = False
"""Whether any context is open.

Separate from the number, because a compiled graph is valid only for the value that it was traced with, and every new
number would compile it again.
"""
_original_precision = "none"
"""torch's setting before the outermost context was opened."""


def onednn_is_faster() -> bool:
    """Whether this machine has AVX-512 that MKL does not use but oneDNN does, without rounding to bfloat16."""
    with _lock:
        return _check_onednn()


@cache
def _check_onednn() -> bool:
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and backends.mkldnn.enabled):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512" or _is_intel():
        return False
    try:
        original_precision = _set_precision("bf16")
    except (AttributeError, RuntimeError):  # torch before 2.9 does not have this setting
        return False
    try:
        with torch.autocast("cpu", enabled=False):
            return all(_products_are_exact(size) for size in (32, 256))
    finally:
        _set_precision(original_precision)


def _is_intel() -> bool:
    cpu_info = Path("/proc/cpuinfo")
    return cpu_info.exists() and "GenuineIntel" in cpu_info.read_text(encoding="utf-8", errors="ignore")


def _set_precision(precision: str) -> str:
    """Set how far torch may round the products that it gives to oneDNN; returns the previous setting."""
    setting = torch.backends.mkldnn.matmul
    previous_precision: str = setting.fp32_precision
    setting.fp32_precision = precision
    return previous_precision


def _products_are_exact(size: int) -> bool:
    """Whether products of whole numbers that fp32 represents exactly, but bfloat16 does not, are exact."""
    x, y, expected = _make_rounding_test(size)
    products = x @ y, torch.bmm(x[None], y[None]), torch.bmm(y.t()[None], x.t()[None]), F.linear(x, y.t())
    return all(bool((product == expected).all()) for product in products)


def _make_rounding_test(size: int) -> tuple[Tensor, Tensor, float]:
    """Two matrices `size × size` in fp32, and the value of every element of their product.

    The numbers of the first have nine significant bits; bfloat16 has eight.
    """
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    x = (257 + 4 * torch.arange(size, **options).remainder(32)).expand(size, size).contiguous()
    y = torch.arange(size, **options).remainder(3).expand(size, size).t().contiguous()
    return x, y, float(x[0].double() @ y[:, 0].double())


@contextmanager
def onednn_products(device: str = "cpu") -> Iterator[None]:
    """Inside this context, fp32 products on a CPU use oneDNN where that is faster; also wrap the backward pass in it.

    `device`: the type of the device that computes. On any other device than a CPU the context does nothing.
    """
    if device != "cpu" or not onednn_is_faster():
        yield
        return
    cpu_memory.keep_freed_memory()  # otherwise batched attention would get new memory pages for its scores every time
    _thread_state.depth = getattr(_thread_state, "depth", 0) + 1
    _count_contexts(1)
    try:
        yield
    finally:
        _thread_state.depth -= 1
        _count_contexts(-1)


def uses_onednn(device: str = "cpu") -> bool:
    """Whether this thread is inside `onednn_products` and the products really use oneDNN there."""
    if device != "cpu":
        return False
    if torch.compiler.is_compiling():  # a graph is traced once, inside `onednn_products` where oneDNN is faster
        return _active
    return bool(getattr(_thread_state, "depth", 0))


@contextmanager
def without_onednn(device: str = "cpu") -> Iterator[None]:
    """Inside this context, products are torch's own again, for operations that are slow in oneDNN.

    Outside `onednn_products` it does nothing. While a graph is traced it does nothing either, because a compiled graph
    cannot change the setting midway.
    """
    if not uses_onednn(device) or torch.compiler.is_compiling():
        yield
        return
    with _lock:
        _set_precision(_original_precision)
    try:
        yield
    finally:
        with _lock:
            _set_precision("bf16")  # this thread is still inside `onednn_products`


def _count_contexts(change: int) -> None:
    """Add to the number of open contexts; torch's setting, one for the process, changes with the first and the last."""
    global _open_contexts, _active, _original_precision
    with _lock:
        if _open_contexts == 0:
            _original_precision = _set_precision("bf16")
        _open_contexts += change
        _active = _open_contexts > 0
        if _open_contexts == 0:
            _set_precision(_original_precision)
