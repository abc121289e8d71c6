"""Inputs and comparisons for the tests of attention.

Dimensions: `N` rows, `H` heads, `T` queries, `S` keys, `D` width of a head, `K` experiments of a bank.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from blipfit.runtime import onednn

N, H, T, S, D = 2, 3, 5, 7, 8
K = 3

needs_onednn = pytest.mark.skipif(not onednn.onednn_is_faster(), reason="oneDNN is not faster on this machine")


def make_leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers that require a gradient."""
    return torch.randn(*shape, dtype=dtype, requires_grad=True)


def make_module(**attributes: Any) -> nn.Module:
    """A module with these attributes."""
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def context(route: str) -> AbstractContextManager[None]:
    """The context of a way to compute attention: "onednn" needs one."""
    return onednn.onednn_products() if route == "onednn" else nullcontext()


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert equality up to fp32 rounding of sums in another order."""
    atol = max(1e-5, 2e-6 * float(expected.detach().abs().max()))
    torch.testing.assert_close(actual, expected, atol=atol, rtol=1e-5)


def causal_mask() -> torch.Tensor:
    """bool mask `T × S`."""
    return torch.ones(T, S, dtype=torch.bool).tril()


def padding_mask(*lengths: int) -> torch.Tensor:
    """Padding on the right, as a bool mask `N × 1 × 1 × S`."""
    return torch.arange(S) < torch.tensor(lengths)[:, None, None, None]
