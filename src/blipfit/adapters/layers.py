"""Multi-adapter layers: each holds the weights of K experiments and applies every experiment's weights to its rows.

Inputs have K·B rows: first all B rows of experiment 0, then those of experiment 1, and so on (K-major).

Dimensions: `K` experiments, `B` rows of the batch, `R` rows × positions of one experiment, `r` rank, `I` input width,
`O` output width, `D` width of a layer norm or an embedding, `V` entries of an embedding table. `S` is the number of
experiments in a layer's span: the smallest range of experiments that contains all that have LoRA there; those outside
of it skip the LoRA product. `…` stands for any dimensions. A
suffix such as `_KRI` lists a tensor's dimensions.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# mypy skips torch (see pyproject.toml), so its base classes are of type Any: hence `type: ignore[misc]` below.


class BankLoRA(nn.Module):  # type: ignore[misc]
    """A frozen linear layer with one LoRA per experiment: `y_k = W x_k + scale_k · B_k A_k x_k`.

    `A_KrI` and `B_KOr`: the low-rank matrices. Ranks may differ: smaller ones are padded with zeros, which stay zero
    because the gradient of each padded element is a product with a zero of the other matrix. `scale_K`: the factor of
    each experiment, 0 for experiments without LoRA at this layer. `span`: the experiments from the first to the last
    that has LoRA here; the others cost nothing. `E_Kr1`: AdaLoRA's singular values, for the form `B_k diag(E_k) A_k`.
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
        """The frozen weight `O × I`; T5's feed-forward reads its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """`K·B × … × I` → `K·B × … × O`."""
        K = self.scale.shape[0]
        x_KRI = x.reshape(K, -1, x.shape[-1])
        A_KrI = self.lora_A if self.lora_E is None else self.lora_A * self.lora_E
        scaled_B_KOr = self.lora_B * self.scale[:, None, None]
        is_frozen = type(self.base) is nn.Linear and not self.base.weight.requires_grad
        if is_frozen and _same_dtype(x, self.base.weight, A_KrI):
            low_rank_weights = A_KrI[self.span], scaled_B_KOr[self.span]
            y_KRO = _LowRank.apply(x_KRI, self.base.weight, self.base.bias, *low_rank_weights, self.span)
            return y_KRO.view(*x.shape[:-1], y_KRO.shape[-1])
        y = self.base(x)
        y_KRO = y.view(K, -1, y.shape[-1])
        if self.span == slice(0, K):  # a slice of everything would cost a copy in the backward pass
            return torch.baddbmm(y_KRO, torch.bmm(x_KRI, A_KrI.mT), scaled_B_KOr.mT).view_as(y)
        low_SRr = torch.bmm(x_KRI[self.span], A_KrI[self.span].mT)
        y_SRO = torch.baddbmm(y_KRO[self.span], low_SRr, scaled_B_KOr[self.span].mT)
        return torch.cat([y_KRO[: self.span.start], y_SRO, y_KRO[self.span.stop :]]).view_as(y)


def _same_dtype(x: Tensor, *others: Tensor) -> bool:
    """Whether all tensors have the dtype of `x` and no autocast changes it.

    Not so with a 16-bit backbone below fp32 adapters.
    """
    return not torch.is_autocast_enabled(x.device.type) and all(other.dtype == x.dtype for other in others)


class _LowRank(torch.autograd.Function):  # type: ignore[misc]
    """`y_k = x_k Wᵀ + b + x_k A_kᵀ B_kᵀ` with gradients for x, A and B; the low-rank term is added in place.

    Only the S experiments in `span` have A and B; the others have `y_k = x_k Wᵀ + b`.
    """

    @staticmethod
    def forward(
        ctx: Any, x_KRI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A_SrI: Tensor, B_SOr: Tensor, span: slice
    ) -> Tensor:
        x_SRI = x_KRI[span]
        low_SRr = torch.bmm(x_SRI, A_SrI.mT)
        ctx.span = span
        ctx.save_for_backward(x_SRI, weight_OI, A_SrI, B_SOr, low_SRr)
        y_KRO = F.linear(x_KRI, weight_OI, bias_O)
        y_KRO[span].baddbmm_(low_SRr, B_SOr.mT)
        return y_KRO

    @staticmethod
    def backward(ctx: Any, grad_KRO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor, None]:
        x_SRI, weight_OI, A_SrI, B_SOr, low_SRr = ctx.saved_tensors
        grad_SRO = grad_KRO[ctx.span]
        grad_low_SRr = torch.bmm(grad_SRO, B_SOr)
        grad_x_KRI = None
        if ctx.needs_input_grad[0]:
            grad_x_KRI = grad_KRO @ weight_OI
            grad_x_KRI[ctx.span].baddbmm_(grad_low_SRr, A_SrI)
        return grad_x_KRI, None, None, torch.bmm(grad_low_SRr.mT, x_SRI), torch.bmm(grad_SRO.mT, low_SRr), None


class BankLinear(nn.Module):  # type: ignore[misc]
    """K trained linear layers: `y_k = W_k x_k + b_k`."""

    def __init__(self, weight_KOI: nn.Parameter, bias_KO: nn.Parameter | None):
        super().__init__()
        self.weight, self.bias = weight_KOI, bias_KO

    def forward(self, x: Tensor) -> Tensor:
        """`K·B × … × I` → `K·B × … × O`."""
        K = self.weight.shape[0]
        x_KRI = x.reshape(K, -1, x.shape[-1])
        if self.bias is None:
            y_KRO = torch.bmm(x_KRI, self.weight.mT)
        else:
            y_KRO = torch.baddbmm(self.bias.unsqueeze(1), x_KRI, self.weight.mT)
        return y_KRO.view(*x.shape[:-1], y_KRO.shape[-1])


class BankLayerNorm(nn.Module):  # type: ignore[misc]
    """K trained layer norms: the normalization is computed for all together, then scaled and shifted per experiment."""

    def __init__(self, weight_KD: nn.Parameter, bias_KD: nn.Parameter, eps: float):
        super().__init__()
        self.weight, self.bias, self.eps = weight_KD, bias_KD, eps

    def forward(self, x: Tensor) -> Tensor:
        """`K·B × … × D` → the same shape.

        Four-dimensional rows that all experiments share, `1 × B × … × D`, are normalized once and become
        `K × B × … × D`.
        """
        K, D = self.weight.shape
        if K == 1:
            return F.layer_norm(x, (D,), self.weight[0], self.bias[0], self.eps)
        is_shared = x.dim() == 4 and x.shape[0] == 1
        normalized = F.layer_norm(x, (D,), eps=self.eps).view(1 if is_shared else K, -1, D)
        y_KRD = torch.addcmul(self.bias.unsqueeze(1), normalized, self.weight.unsqueeze(1))
        return y_KRD.view(K, *x.shape[1:]) if is_shared else y_KRD.view_as(x)


class BankEmbedding(nn.Module):  # type: ignore[misc]
    """K trained embedding tables: the ids of each experiment's rows select entries of its own table."""

    def __init__(self, weight_KVD: nn.Parameter):
        super().__init__()
        self.weight = weight_KVD

    def forward(self, ids: Tensor) -> Tensor:
        """Integer ids `K·B × …` → `K·B × … × D`."""
        K = self.weight.shape[0]
        if K == 1:
            return F.embedding(ids, self.weight[0])
        experiments = torch.arange(K, device=ids.device).view(K, *[1] * ids.dim())
        return self.weight[experiments, ids.view(K, -1, *ids.shape[1:])].view(*ids.shape, -1)
