"""The attention of the Q-Former and the language model, registered with transformers under the name "blipfit".

Ordinary attention is transformers' own (`sdpa`). Two cases are computed here as batched matrix products with their own
backward pass: attention with dropout, because all experiments of a bank share its noise, and on some CPUs short
attention in fp32 (`onednn.onednn_products`).

Dimensions: `N` rows, `H` heads, `T` queries, `S` keys, `D` width of a head; in a bank, N = K·B with `K` experiments and
`B` rows of the batch. `N·H` is a single dimension of that size. A suffix such as `_NHTS` lists a tensor's dimensions.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from blipfit.runtime import onednn
from blipfit.runtime.shared_dropout import BANK_SIZE, apply_mask, sample_mask

NAME = "blipfit"
MAX_PAIRS = 2**16
"""Largest T × S for which attention without dropout is computed as batched products."""
CAUSAL = torch.empty(0, 0, 0, 0)
"""An attention mask that means: causal, and nothing else is masked.

Rows padded on the right need no other mask, because no token attends to the tokens after it. It has four dimensions
because transformers passes such tensors on unchanged; it reads the values of other masks, and the CPU would wait for
the GPU.
"""


def enable(model: Any) -> None:
    """Make a Hugging Face model compute its attention with this module.

    Every submodel is set separately: T5's encoder and decoder have configurations of their own, which some versions of
    transformers do not update.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.set_attn_implementation(NAME)
            assert module.config._attn_implementation == NAME, type(module)


def forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,  # transformers passes these arguments by name
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: query `N × H × T × D`, key and value `N × H × S × D` → `N × T × H × D`.

    `attention_mask`: None, `CAUSAL`, or a tensor that broadcasts to `N × H × T × S`, either bool (True: attend) or
    floating point and added to the scores. `dropout`: probability that an attention probability is dropped. `scaling`:
    factor of the scores, 1 / √D if absent. `is_causal`: the module's own attribute if absent; without effect where
    there is a mask or a single query. `position_bias`: added to the scores, `1 × H × T × S`.

    Returns the output and None: attention probabilities are not returned. Raises NotImplementedError for dropout with
    fewer key heads than query heads, which no supported model has.
    """
    if attention_mask is not None and attention_mask.numel() == 0:
        attention_mask, is_causal = None, True
    if dropout == 0 and not _prefers_batched_products(query, key, value, attention_mask):
        arguments = (module, query, key, value, attention_mask, 0.0, scaling, is_causal, position_bias)
        if not onednn.uses_onednn(query.device.type) or torch.compiler.is_compiling():
            return sdpa_attention_forward(*arguments, **options)  # type: ignore[no-any-return]
        with onednn.without_onednn():
            return sdpa_attention_forward(*arguments, **options)  # type: ignore[no-any-return]
    if query.shape[1] != key.shape[1]:
        raise NotImplementedError("dropout in attention with grouped key heads is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = attention_mask
    if causal and mask is None and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    bank_size = getattr(module, BANK_SIZE, 1)
    output_NHTD = compute_batched(query, key, value, position_bias, mask, scale, dropout, bank_size)
    return output_NHTD.transpose(1, 2).contiguous(), None


def _prefers_batched_products(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether attention without dropout is computed as batched products: on a CPU in `onednn_products`, if faster."""
    return (
        onednn.uses_onednn(query.device.type)
        and all(tensor.dtype == torch.float32 and tensor.numel() > 0 for tensor in (query, key, value))
        and query.shape[:2] == key.shape[:2] == value.shape[:2]
        and query.shape[2] * key.shape[2] <= MAX_PAIRS
        and (mask is None or mask.dtype in (torch.float32, torch.bool))
        and not torch.is_autocast_enabled("cpu")
    )


def compute_batched(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    p: float = 0.0,
    bank_size: int = 1,
) -> Tensor:
    """Compute attention as batched products over N·H.

    `query` `N × H × T × D`, `key` and `value` `N × H × S × D`; `bias` and `mask` as `position_bias` and
    `attention_mask` of `forward`, but `mask` cannot be `CAUSAL`; `scale`: factor of the scores; `p`: dropout
    probability of the attention probabilities; `bank_size`: number of experiments that share the noise.

    Returns `N × H × T × D`. In fp32 the attention probabilities are saved for the backward pass; in 16 bit, where
    memory is scarce, the backward pass computes them again.
    """
    if torch.is_autocast_enabled(query.device.type):
        autocast_dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(autocast_dtype), key.to(autocast_dtype), value.to(autocast_dtype)
    noise = None
    if p:
        noise = sample_mask(_shape_only(query, (*query.shape[:3], key.shape[2])), p, bank_size)
    # Under autocast on a GPU, softmax would return fp32, which takes twice the memory.
    with torch.autocast(query.device.type, enabled=False):
        inputs = query, key, value, bias, mask, noise, scale, p
        if torch.compiler.is_compiling():
            return checkpoint(_attention_for_compiler, *inputs, use_reentrant=False)  # type: ignore[no-any-return]
        return _Attention.apply(*inputs)  # type: ignore[no-any-return]


def _attention_for_compiler(
    query_NHTD: Tensor,
    key_NHSD: Tensor,
    value_NHSD: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    scale: float,
    p: float,
) -> Tensor:
    """The same attention as `_Attention`, in plain torch operations that the compiler can trace."""
    # Same arithmetic as `_Attention`, written again: torch 2.11's compiler cannot trace that class, but derives the
    # backward pass of these plain operations and fuses them. Every change must be made in both.
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


def _shape_only(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of this shape with the dtype and device of `x` that takes no memory."""
    return x.new_empty(1).expand(shape)


class _Attention(torch.autograd.Function):
    """`(softmax(scale · q kᵀ + bias, masked) · noise) v` with its own backward pass; noise only with dropout."""

    # Same arithmetic as `_attention_for_compiler`, written again: outside a compiled graph this class saves memory and
    # time. It adds bias and mask to the scores in place, and computes 16-bit probabilities again in the backward pass.
    # Every change must be made in both.

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
        if scale != 1:  # scale and lay out for the batched product in a single pass over memory
            scaled = torch.mul(query_NHTD, scale, out=query_NHTD.new_empty(query_NHTD.shape))
        query, key, value = (x.reshape(N * H, *x.shape[2:]) for x in (scaled, key_NHSD, value_NHSD))
        probabilities = _probabilities(query, key, (N, H), bias, mask)
        save_probabilities = query.dtype in (torch.float32, torch.float64)
        ctx.save_for_backward(query, key, value, bias, mask, noise, probabilities if save_probabilities else None)
        ctx.shape, ctx.scale, ctx.p = (N, H), scale, p
        dropped = probabilities if noise is None else _apply_noise(probabilities, (N, H), noise, p)
        return torch.bmm(dropped, value).view(N, H, T, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The caller may run backward inside autocast.
        with torch.autocast(grad_NHTD.device.type, enabled=False):
            return _Attention._backward_without_autocast(ctx, grad_NHTD)

    @staticmethod
    def _backward_without_autocast(ctx: Any, grad_NHTD: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients for all inputs of `forward`; None for those that have no gradient."""
        query, key, value, bias, mask, noise, probabilities = ctx.saved_tensors
        if probabilities is None:
            probabilities = _probabilities(query, key, ctx.shape, bias, mask)
        grad_output = grad_NHTD.reshape(len(query), *grad_NHTD.shape[2:])
        grad_probabilities = torch.bmm(grad_output, value.mT)
        dropped = probabilities
        if noise is not None:
            grad_probabilities = _apply_noise(grad_probabilities, ctx.shape, noise, ctx.p)
            dropped = _apply_noise(probabilities, ctx.shape, noise, ctx.p)
        grad_scores = torch._softmax_backward_data(grad_probabilities, probabilities, -1, query.dtype)
        grad_query = torch.bmm(grad_scores, key)
        grads = (
            grad_query if ctx.scale == 1 else grad_query.mul_(ctx.scale),
            torch.bmm(grad_scores.mT, query),  # the query is already scaled
            torch.bmm(dropped.mT, grad_output),
        )
        grads_bias_mask: list[Tensor | None] = [None, None]
        for i, term in enumerate((bias, mask)):
            if ctx.needs_input_grad[3 + i]:
                grads_bias_mask[i] = grad_scores.view(*ctx.shape, *grad_scores.shape[1:]).sum_to_size(term.shape)
        return (*(x.view(*ctx.shape, *x.shape[1:]) for x in grads), *grads_bias_mask, None, None, None)


def _probabilities(
    query: Tensor, key: Tensor, shape: tuple[int, int], bias: Tensor | None, mask: Tensor | None
) -> Tensor:
    """Attention probabilities `N·H × T × S` of a scaled query `N·H × T × D` and a key `N·H × S × D`.

    `shape`: (N, H). `bias` and `mask` as in `compute_batched`.
    """
    scores = torch.bmm(query, key.mT)
    scores_NHTS = scores.view(*shape, *scores.shape[1:])
    if bias is not None:
        scores_NHTS.add_(bias)
    if mask is not None and mask.dtype == torch.bool:
        # Not −∞: a row that may attend to nothing (only padding has such rows) would become NaN.
        scores_NHTS.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores_NHTS.add_(mask)
    return scores.softmax(-1)


def _apply_noise(x: Tensor, shape: tuple[int, int], noise: Tensor, p: float) -> Tensor:
    """Apply a dropout mask `B × H × T × S` to a tensor `N·H × T × S`; `shape`: (N, H)."""
    return apply_mask(x.view(*shape, *x.shape[1:]), noise, p).view_as(x)


AttentionInterface.register(NAME, forward)
AttentionMaskInterface.register(NAME, sdpa_mask)
