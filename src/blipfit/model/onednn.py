"""Matrix products in fp32 on a CPU through oneDNN, where torch's own would go through MKL.

Both compute the same in fp32. On a processor that is not Intel's MKL takes its AVX2 code, oneDNN takes AVX-512: large
products and the thin ones of LoRA are about twice as fast (`python -m benchmarks.products`). torch hands fp32 products
to oneDNN where it is allowed to round them to bfloat16. oneDNN makes use of that on some processors and computes in
fp32 on others; only on the latter, told apart by trying, is it allowed here. torch's own attention calls thousands of
tiny products, which oneDNN is slow at; so short attention goes through whole batches of them instead, which is faster
than either. Everything else, and every other machine, goes the ordinary way.
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

from blipfit.model import heap

MOST_PAIRS = 2**16
"""Queries × keys of the longest attention whose probabilities are kept for backward, as the batched form must."""

_ordinary = F.scaled_dot_product_attention
_lock = threading.Lock()
_inside = threading.local()
_entered = 0
"""How many contexts are open, of all threads."""
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


def install() -> None:
    """Stand before torch's attention, for good: what replaces it for a while must find this one there."""
    if F.scaled_dot_product_attention is _ordinary:
        F.scaled_dot_product_attention = _attend  # type: ignore[assignment]


@contextmanager
def products(device: str = "cpu") -> Iterator[None]:
    """Within it fp32 products on a CPU go through oneDNN where that pays; forward and backward want it each.

    `device`: the type of device that computes; on any other than a CPU nothing changes.
    """
    if device != "cpu" or not pays():
        yield
        return
    install()
    heap.keep_freed()  # batched attention would pay for the pages of its scores every time
    depth = getattr(_inside, "depth", 0)
    _inside.depth = depth + 1
    _enter(1)
    try:
        yield
    finally:
        _inside.depth = depth
        _enter(-1)


def _enter(change: int) -> None:
    """torch's setting is the process's: it is changed while any thread is inside."""
    global _entered, _before
    with _lock:
        if _entered == 0:
            _before = _allow("bf16")
        _entered += change
        if _entered == 0:
            _allow(_before)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **options: Any,
) -> Tensor:
    """In the place of `F.scaled_dot_product_attention`."""

    def ordinary() -> Tensor:
        return _ordinary(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **options)

    if not getattr(_inside, "depth", 0):
        return ordinary()
    if dropout_p == 0 and not options.get("enable_gqa") and _short(query, key, value, attn_mask, is_causal):
        if is_causal:
            attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
        return _Attention.apply(query, key, value, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)  # type: ignore[no-any-return]
    with _lock:
        _allow(_before)
    try:
        return ordinary()
    finally:
        with _lock:
            _allow("bf16")  # this thread is inside


def _short(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool) -> bool:
    """Whether the batched form computes this attention."""
    three = (query, key, value)
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 and x.numel() > 0 for x in three)
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[2] * key.shape[2] <= MOST_PAIRS
        and (mask is None or (not is_causal and mask.dtype in (torch.float32, torch.bool)))
        and not torch.is_autocast_enabled("cpu")
    )


class _Attention(torch.autograd.Function):
    """Attention of `N` rows and `H` heads as batched products over N·H, with the probabilities kept for backward."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, query_NHTD: Tensor, key_NHSD: Tensor, value_NHSD: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor:
        N, H, T, _ = query_NHTD.shape
        # One pass: scaled, and in the order that a batched product wants.
        scaled = torch.mul(query_NHTD, scale, out=query_NHTD.new_empty(query_NHTD.shape))
        query, key, value = (x.reshape(N * H, *x.shape[2:]) for x in (scaled, key_NHSD, value_NHSD))
        scores = torch.bmm(query, key.mT)
        scores_NHTS = scores.view(N, H, T, -1)
        if mask is not None and mask.dtype == torch.bool:
            # Not −∞: a row with nothing to attend to, which only padding has, stays a number.
            scores_NHTS.masked_fill_(~mask, torch.finfo(scores.dtype).min)
        elif mask is not None:
            scores_NHTS.add_(mask)
        probabilities = scores.softmax(-1)
        ctx.save_for_backward(query, key, value, probabilities)
        ctx.shape, ctx.scale, ctx.mask_shape = (N, H), scale, None if mask is None else mask.shape
        return torch.bmm(probabilities, value).view(N, H, T, -1)

    @staticmethod
    def backward(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, probabilities = ctx.saved_tensors
        grad = grad_NHTD.reshape(len(query), *grad_NHTD.shape[2:])
        for_probabilities = torch.bmm(grad, value.mT)
        for_scores = torch._softmax_backward_data(for_probabilities, probabilities, -1, query.dtype)
        found = (
            torch.bmm(for_scores, key).mul_(ctx.scale),
            torch.bmm(for_scores.mT, query),  # the query is scaled already
            torch.bmm(probabilities.mT, grad),
        )
        for_mask = None
        if ctx.needs_input_grad[3]:
            for_mask = for_scores.view(*ctx.shape, *for_scores.shape[1:]).sum_to_size(ctx.mask_shape)
        return (*(x.view(*ctx.shape, *x.shape[1:]) for x in found), for_mask, None)
