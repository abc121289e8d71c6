"""Dropout that does not depend on who else is in the bank."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@contextmanager
def shared_dropout(K: int) -> Iterator[None]:
    """Within it, dropout draws one mask for the B rows of a batch and gives it to all K experiments.

    So an experiment sees the noise it would see alone, a banked run equals K single ones also with dropout, and
    comparisons between experiments share their noise. Covers `nn.Dropout`, functional dropout and the dropout inside
    scaled-dot-product attention, by standing in for the three functions while the context lasts.
    """
    dropout, attention = F.dropout, F.scaled_dot_product_attention

    def one_mask(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not training or p == 0:
            return x
        B = x.shape[0] // K
        mask = torch.empty((B, *x.shape[1:]), dtype=x.dtype, device=x.device).bernoulli_(1 - p).div_(1 - p)
        return x * mask if K == 1 else (x.view(K, *mask.shape) * mask).view_as(x)

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        if dropout_p == 0:
            return attention(query, key, value, attn_mask, 0.0, is_causal, scale=scale, **options)
        if is_causal or options.get("enable_gqa"):
            raise NotImplementedError("causal attention with dropout: no model of blipfit has it")
        scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            scores = (
                scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
            )
        return one_mask(scores.softmax(-1), dropout_p) @ value

    F.dropout, F.scaled_dot_product_attention = one_mask, attend  # type: ignore[assignment]
    try:
        yield
    finally:
        F.dropout, F.scaled_dot_product_attention = dropout, attention
