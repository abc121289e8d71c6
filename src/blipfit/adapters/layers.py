"""multi-adapter layers: each holds the weights of K experiments and gives every slice of rows its own.

Inputs have K·B rows, K-major. `K` experiments, `R` rows × positions of one experiment, `r` rank, `I` in, `O` out.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BankLoRA(nn.Module):
    """A frozen linear layer with one LoRA an experiment beside it: `y_k = W x + scale_k · B_k A_k x`.

    Ranks may differ: A and B are padded with zeros, which stay zero (each one's gradient is a product with the
    other). Experiments without LoRA here have rank 0; `first:last` is the span of those that have it, so that the
    others cost nothing. With `E_Kr1` it is AdaLoRA's form `B_k diag(E_k) A_k`.
    """

    def __init__(
        self,
        base: nn.Linear,
        A_KrI: nn.Parameter,
        B_KOr: nn.Parameter,
        scale_K: Tensor,
        span: slice,
        E_Kr1: nn.Parameter | None = None,
    ):
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B, self.lora_E = A_KrI, B_KOr, E_Kr1
        self.register_buffer("scale", scale_K, persistent=False)
        self.scale: Tensor
        self.span = span

    @property
    def weight(self) -> Tensor:
        """The frozen weight; T5's feed-forward asks for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        K = self.scale.shape[0]
        x_KRI = x.reshape(K, -1, x.shape[-1])
        A = self.lora_A if self.lora_E is None else self.lora_A * self.lora_E
        scaled_B = self.lora_B * self.scale[:, None, None]
        frozen = type(self.base) is nn.Linear and not self.base.weight.requires_grad
        if frozen and _one_type(x, self.base.weight, A):
            inside = A[self.span], scaled_B[self.span]
            y = _LowRank.apply(x_KRI, self.base.weight, self.base.bias, *inside, self.span)
            return y.view(*x.shape[:-1], y.shape[-1])
        y = self.base(x)
        y_KRO = y.view(K, -1, y.shape[-1])
        if self.span == slice(0, K):  # a slice of everything would cost a copy in backward
            return torch.baddbmm(y_KRO, torch.bmm(x_KRI, A.mT), scaled_B.mT).view_as(y)
        low = torch.bmm(x_KRI[self.span], A[self.span].mT)
        inside = torch.baddbmm(y_KRO[self.span], low, scaled_B[self.span].mT)
        return torch.cat([y_KRO[: self.span.start], inside, y_KRO[self.span.stop :]]).view_as(y)


def _one_type(x: Tensor, *others: Tensor) -> bool:
    """Whether everything is of one type and stays so: no autocast, no 16-bit backbone below fp32 adapters."""
    return not torch.is_autocast_enabled(x.device.type) and all(other.dtype == x.dtype for other in others)


class _LowRank(torch.autograd.Function):
    """`y_k = x_k Wᵀ + b + x_k A_kᵀ B_kᵀ` with gradients for x, A and B; adds in place to what the frozen layer gave.

    Only the experiments in `span` have A and B; for the others it is `x_k Wᵀ + b`.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x_KRI: Tensor, weight: Tensor, bias: Tensor | None, A_KrI: Tensor, B_KOr: Tensor, span: slice
    ) -> Tensor:
        inside = x_KRI[span]
        low_KRr = torch.bmm(inside, A_KrI.mT)
        ctx.span = span
        ctx.save_for_backward(inside, weight, A_KrI, B_KOr, low_KRr)
        y_KRO = F.linear(x_KRI, weight, bias)
        y_KRO[span].baddbmm_(low_KRr, B_KOr.mT)
        return y_KRO

    @staticmethod
    def backward(ctx: Any, grad_KRO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:  # type: ignore[override]
        inside, weight, A_KrI, B_KOr, low_KRr = ctx.saved_tensors
        above = grad_KRO[ctx.span]
        below_KRr = torch.bmm(above, B_KOr)
        x_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = grad_KRO @ weight
            x_grad[ctx.span].baddbmm_(below_KRr, A_KrI)
        return x_grad, None, None, torch.bmm(below_KRr.mT, inside), torch.bmm(above.mT, low_KRr), None


class BankLinear(nn.Module):
    """K linear layers: `y_k = W_k x + b_k`."""

    def __init__(self, weight_KOI: nn.Parameter, bias_KO: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight_KOI, bias_KO

    def forward(self, x: Tensor) -> Tensor:
        K = self.weight.shape[0]
        x_KRI = x.reshape(K, -1, x.shape[-1])
        if self.bias is None:
            y = torch.bmm(x_KRI, self.weight.mT)
        else:
            y = torch.baddbmm(self.bias.unsqueeze(1), x_KRI, self.weight.mT)
        return y.view(*x.shape[:-1], y.shape[-1])


class BankLayerNorm(nn.Module):
    """K layer norms: the normalization is shared arithmetic, scale and shift are each experiment's.

    Rows that are the same for all, `1 × B × … × D`, are normalized once and become `K × B × … × D`.
    """

    def __init__(self, weight_KD: nn.Parameter, bias_KD: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight_KD, bias_KD, eps

    def forward(self, x: Tensor) -> Tensor:
        K, D = self.weight.shape
        if K == 1:
            return F.layer_norm(x, (D,), self.weight[0], self.bias[0], self.eps)
        shared = x.dim() == 4 and x.shape[0] == 1
        normed = F.layer_norm(x, (D,), eps=self.eps).view(1 if shared else K, -1, D)
        y_KRD = torch.addcmul(self.bias.unsqueeze(1), normed, self.weight.unsqueeze(1))
        return y_KRD.view(K, *x.shape[1:]) if shared else y_KRD.view_as(x)


class BankEmbedding(nn.Module):
    """K embedding tables; every id row reads its own experiment's."""

    def __init__(self, weight_KVD: nn.Parameter):
        super().__init__()
        self.weight = weight_KVD

    def forward(self, ids: Tensor) -> Tensor:
        K = self.weight.shape[0]
        if K == 1:
            return F.embedding(ids, self.weight[0])
        experiment = torch.arange(K, device=ids.device).view(K, *[1] * ids.dim())
        return self.weight[experiment, ids.view(K, -1, *ids.shape[1:])].view(*ids.shape, -1)
