"""The attention of the Q-Former and the language model, registered with transformers under the name "blipfit".

Plain attention is transformers' own (`sdpa`). Two cases are computed here, as batched matrix products with a backward
pass of their own: attention with dropout, whose noise all experiments of a bank share, and on some CPUs short
attention in fp32 (`cpu.products`).

`N` rows, `H` heads, `T` queries, `S` keys, `D` width of a head; `K` experiments, `B` = N / K rows of a batch.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from blipfit.runtime import cpu
from blipfit.runtime.dropout import BANK_SIZE, apply_mask, draw_mask

NAME = "blipfit"
MOST_PAIRS = 2**16
"""T × S of the longest attention that is computed here without dropout."""
CAUSAL = torch.empty(0, 0, 0, 0)
"""As an attention mask: causal, and nothing else is masked.

Rows padded on the right need no more, because no token attends to what follows it. It is a tensor of four dimensions
because transformers takes those as they are; other masks it reads on the device, and the host waits for the answer.
"""


def use(model: Any) -> None:
    """Let a Hugging Face model compute its attention here.

    Its parts are set one by one: T5's two stacks have configurations of their own, which some versions of transformers
    leave as they are.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.set_attn_implementation(NAME)
            assert part.config._attn_implementation == NAME, type(part)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # the names are transformers'
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query `N × H × T × D`, key and value `N × H × S × D` → `N × T × H × D`.

    `attention_mask`: None, `CAUSAL`, or broadcastable to `N × H × T × S`, bool (True: attend) or added to the scores.
    `position_bias`: added to the scores, `1 × H × T × S`. Raises NotImplementedError for dropout with fewer key heads
    than query heads, which no supported model has.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask, is_causal = None, True
    if dropout == 0 and not _is_batched(query, key, value, attention_mask):
        arguments = (module, query, key, value, attention_mask, 0.0, scaling, is_causal, position_bias)
        if not cpu.in_products(query.device.type) or torch.compiler.is_compiling():
            return sdpa_attention_forward(*arguments, **options)  # type: ignore[no-any-return]
        with cpu.plain_products():
            return sdpa_attention_forward(*arguments, **options)  # type: ignore[no-any-return]
    if query.shape[1] != key.shape[1]:
        raise NotImplementedError("dropout in attention with grouped key heads")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if causal and mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    size = getattr(module, BANK_SIZE, 1)
    return batched(query, key, value, position_bias, mask, scale, dropout, size).transpose(1, 2).contiguous(), None


def _is_batched(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether batched products are the faster way to compute attention without dropout."""
    return (
        cpu.in_products(query.device.type)
        and all(x.dtype == torch.float32 and x.numel() > 0 for x in (query, key, value))
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[2] * key.shape[2] <= MOST_PAIRS
        and (mask is None or mask.dtype in (torch.float32, torch.bool))
        and not torch.is_autocast_enabled("cpu")
    )


def batched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    p: float = 0.0,
    bank_size: int = 1,
) -> Tensor:
    """Attention as batched products over N·H → `N × H × T × D`; `p` of the probabilities are dropped.

    In fp32 the probabilities are kept for backward; in 16 bit, where memory counts, they are computed again there.
    """
    if torch.is_autocast_enabled(query.device.type):
        low = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(low), key.to(low), value.to(low)
    noise = None
    if p:
        noise = draw_mask(_like(query, (*query.shape[:3], key.shape[2])), p, bank_size)
    # Under a GPU's autocast softmax would give fp32, twice the memory.
    with torch.autocast(query.device.type, enabled=False):
        inputs = query, key, value, bias, mask, noise, scale, p
        if torch.compiler.is_compiling():  # torch 2.11's compiler cannot trace the function below
            return checkpoint(_differentiable, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return _Attention.apply(*inputs)  # type: ignore[no-any-return]


def _differentiable(
    query_NHTD: Tensor,
    key_NHSD: Tensor,
    value_NHSD: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    scale: float,
    p: float,
) -> Tensor:
    """`_Attention` for the compiler, which makes the backward pass and fuses what is not a product."""
    query_NHTD = query_NHTD if scale == 1 else query_NHTD * scale
    scores_NHTS = query_NHTD @ key_NHSD.mT
    if bias is not None:
        scores_NHTS = scores_NHTS + bias.to(scores_NHTS.dtype)
    if mask is not None and mask.dtype == torch.bool:
        scores_NHTS = scores_NHTS.masked_fill(~mask, torch.finfo(scores_NHTS.dtype).min)
    elif mask is not None:
        scores_NHTS = scores_NHTS + mask.to(scores_NHTS.dtype)
    probabilities = scores_NHTS.softmax(-1)
    return (probabilities if noise is None else apply_mask(probabilities, noise, p)) @ value_NHSD


def _like(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of that shape, type and device that takes no memory."""
    return x.new_empty(1).expand(shape)


class _Attention(torch.autograd.Function):
    """`softmax(scale · q kᵀ + bias, masked) · noise` times the values."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        query_NHTD: Tensor,
        key_NHSD: Tensor,
        value_NHSD: Tensor,
        bias: Tensor | None,
        mask: Tensor | None,
        noise: Tensor | None,
        scale: float,
        p: float,
    ) -> Tensor:
        N, H, T, _ = query_NHTD.shape
        scaled = query_NHTD
        if scale != 1:  # one pass: scaled, and in the order that a batched product wants
            scaled = torch.mul(query_NHTD, scale, out=query_NHTD.new_empty(query_NHTD.shape))
        query, key, value = (x.reshape(N * H, *x.shape[2:]) for x in (scaled, key_NHSD, value_NHSD))
        probabilities = _probabilities(query, key, (N, H), bias, mask)
        keep = query.dtype in (torch.float32, torch.float64)
        ctx.save_for_backward(query, key, value, bias, mask, noise, probabilities if keep else None)
        ctx.shape, ctx.scale, ctx.p = (N, H), scale, p
        dropped = probabilities if noise is None else _dropped(probabilities, (N, H), noise, p)
        return torch.bmm(dropped, value).view(N, H, T, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # A caller may run backward inside autocast.
        with torch.autocast(grad_NHTD.device.type, enabled=False):
            return _Attention._gradients(ctx, grad_NHTD)

    @staticmethod
    def _gradients(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask, noise, probabilities = ctx.saved_tensors
        if probabilities is None:
            probabilities = _probabilities(query, key, ctx.shape, bias, mask)
        grad = grad_NHTD.reshape(len(query), *grad_NHTD.shape[2:])
        for_probabilities = torch.bmm(grad, value.mT)
        dropped = probabilities
        if noise is not None:
            for_probabilities = _dropped(for_probabilities, ctx.shape, noise, ctx.p)
            dropped = _dropped(probabilities, ctx.shape, noise, ctx.p)
        for_scores = torch._softmax_backward_data(for_probabilities, probabilities, -1, query.dtype)
        for_query = torch.bmm(for_scores, key)
        grads = (
            for_query if ctx.scale == 1 else for_query.mul_(ctx.scale),
            torch.bmm(for_scores.mT, query),  # the query is scaled already
            torch.bmm(dropped.mT, grad),
        )
        added: list[Tensor | None] = [None, None]
        for place, term in enumerate((bias, mask)):
            if ctx.needs_input_grad[3 + place]:
                added[place] = for_scores.view(*ctx.shape, *for_scores.shape[1:]).sum_to_size(term.shape)
        return (*(x.view(*ctx.shape, *x.shape[1:]) for x in grads), *added, None, None, None)


def _probabilities(
    query: Tensor, key: Tensor, shape: tuple[int, int], bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """`N·H × T × S` of a scaled query `N·H × T × D`."""
    scores = torch.bmm(query, key.mT)
    scores_NHTS = scores.view(*shape, *scores.shape[1:])
    if bias is not None:
        scores_NHTS.add_(bias)
    if mask is not None and mask.dtype == torch.bool:
        # Not −∞: a row with nothing to attend to, which only padding has, stays a number.
        scores_NHTS.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores_NHTS.add_(mask)
    return scores.softmax(-1)


def _dropped(x: Tensor, shape: tuple[int, int], noise: Tensor, p: float) -> Tensor:
    return apply_mask(x.view(*shape, *x.shape[1:]), noise, p).view_as(x)


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
