"""Matrix products of fp32 layers on a CPU through oneDNN, where torch's own would go through MKL.

Both compute the same in fp32. On a processor that is not Intel's MKL takes its AVX2 code, oneDNN takes AVX-512: a layer
with LoRA beside it, forward and backward, is 1.4 to 1.9 times as fast (`python -m benchmarks.products`). torch reaches
oneDNN by an operator without a backward pass, so it is given here. Everything else, and every other machine, goes the
ordinary way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_linear = F.linear
_lock = threading.Lock()
_inside = threading.local()
_entered = 0
"""How many contexts are open, of all threads."""


def usable(x: Tensor) -> bool:
    """Whether a product with `x` should go through oneDNN."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() > 0
        and not torch.is_autocast_enabled("cpu")
        and pays()
    )


@cache
def pays() -> bool:
    """Whether this machine has the operator, and AVX-512 that MKL does not use."""
    backends = torch.backends
    if not (backends.mkl.is_available() and backends.mkldnn.is_available() and backends.mkldnn.enabled):
        return False
    if backends.cpu.get_cpu_capability() != "AVX512" or _intel():
        return False
    try:  # it is not part of torch's documented interface
        x = torch.ones(3, 2, dtype=torch.float32, device="cpu")
        return bool(product(x, x[:2]).equal(torch.full((3, 2), 2.0, dtype=torch.float32, device="cpu")))
    except (AttributeError, RuntimeError, TypeError):
        return False


def _intel() -> bool:
    told = Path("/proc/cpuinfo")
    return told.exists() and "GenuineIntel" in told.read_text(encoding="utf-8", errors="ignore")


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x Wᵀ + b` for x `… × I` and W `O × I`, without a gradient."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")  # type: ignore[no-any-return]


def _each(x_KRI: Tensor, weight_KOI: Tensor) -> Tensor:
    """`product` of every experiment, `K × R × O`."""
    return torch.stack([product(x, weight) for x, weight in zip(x_KRI, weight_KOI, strict=True)])


class _Linear(torch.autograd.Function):
    """`product` with gradients, for what asks for them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        return (
            product(grad, weight.t()) if for_x else None,
            product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if for_weight else None,
            rows.sum(0) if for_bias else None,
        )


class _Bank(torch.autograd.Function):
    """K linear layers, all trained; see `bank`."""

    @staticmethod
    def forward(ctx: Any, x_KRI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x_KRI, weight_KOI)
        biases = [None] * len(x_KRI) if bias_KO is None else list(bias_KO)
        return torch.stack([product(x, w, b) for x, w, b in zip(x_KRI, weight_KOI, biases, strict=True)])

    @staticmethod
    def backward(ctx: Any, grad_KRO: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:  # type: ignore[override]
        x_KRI, weight_KOI = ctx.saved_tensors
        grad_KRO = grad_KRO.contiguous()
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _each(grad_KRO, weight_KOI.mT)
        weights = _each(grad_KRO.mT, x_KRI.mT)
        return x_grad, weights, grad_KRO.sum(1) if ctx.needs_input_grad[2] else None


def bank(x_KRI: Tensor, weight_KOI: Tensor, bias_KO: Tensor | None) -> Tensor:
    """`y_k = x_k W_kᵀ + b_k`, `K × R × O`, with gradients for all three."""
    return _Bank.apply(x_KRI, weight_KOI, bias_KO)  # type: ignore[no-any-return]


class _LowRank(torch.autograd.Function):
    """A frozen linear layer with a low-rank product an experiment beside it; see `low_rank`."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_KRI: Tensor, weight: Tensor, bias: Tensor | None, A_KrI: Tensor, B_KOr: Tensor, span: slice
    ) -> Tensor:
        inside = x_KRI[span]
        low_KRr = _each(inside, A_KrI)
        ctx.span = span
        ctx.save_for_backward(inside, weight, A_KrI, B_KOr, low_KRr)
        y_KRO = product(x_KRI, weight, bias)
        y_KRO[span].baddbmm_(low_KRr, B_KOr.mT)
        return y_KRO

    @staticmethod
    def backward(ctx: Any, grad_KRO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:  # type: ignore[override]
        inside, weight, A_KrI, B_KOr, low_KRr = ctx.saved_tensors
        grad_KRO = grad_KRO.contiguous()
        above = grad_KRO[ctx.span]
        below_KRr = _each(above, B_KOr.mT)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = product(grad_KRO, weight.t())
            x_grad[ctx.span].baddbmm_(below_KRr, A_KrI)
        return x_grad, None, None, torch.bmm(below_KRr.mT, inside), torch.bmm(above.mT, low_KRr), None


def low_rank(
    x_KRI: Tensor, weight: Tensor, bias: Tensor | None, A_KrI: Tensor, B_KOr: Tensor, span: slice = slice(None)
) -> Tensor:
    """`y_k = x_k Wᵀ + b + x_k A_kᵀ B_kᵀ`, `K × R × O`, with gradients for x, A and B.

    Only the experiments in `span` have A and B; for the others it is `x_k Wᵀ + b`.
    """
    if len(A_KrI) == 0:
        return _Linear.apply(x_KRI, weight, bias)  # type: ignore[no-any-return]
    return _LowRank.apply(x_KRI, weight, bias, A_KrI, B_KOr, span)  # type: ignore[no-any-return]


@contextmanager
def products() -> Iterator[None]:
    """Within it, in this thread, `F.linear` and so every linear layer goes through oneDNN where `usable`."""
    depth = getattr(_inside, "depth", 0)
    _inside.depth = depth + 1
    _enter(1)
    try:
        yield
    finally:
        _inside.depth = depth
        _enter(-1)


def _enter(change: int) -> None:
    """The function is replaced while any thread is inside."""
    global _entered
    with _lock:
        _entered += change
        F.linear = _through if _entered else _linear  # type: ignore[assignment]


def _through(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """In the place of `F.linear`."""
    ordinary = type(weight) in (Tensor, nn.Parameter) and weight.dtype == torch.float32 and weight.dim() == 2
    if not (ordinary and getattr(_inside, "depth", 0) and usable(input)):
        return _linear(input, weight, bias)
    rows = _Linear.apply(input.reshape(-1, input.shape[-1]), weight, bias)
    return rows.view(*input.shape[:-1], len(weight))  # type: ignore[no-any-return]
