"""How the layers of a model run in training: as they are, compiled, or with their activations computed twice.

Compiling is regional: `torch.compile` sees the forward pass of one layer, and all layers of a kind share what was
compiled. That takes seconds where compiling the whole model takes minutes. Checkpointing stores only a layer's
input and computes the rest again in the backward pass.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

RECOMPILE_LIMIT = 64
"""Variants of a layer's forward pass: first or later layer, with cross-attention or not, lengths, sizes of a bank."""


class LayerExecution:
    """Layers that run compiled, checkpointed or both while it is installed; they must be called with gradients on."""

    def __init__(self, compiled: Iterable[nn.Module] = (), checkpointed: Iterable[nn.Module] = ()):
        self._compiled, self._checkpointed = list(compiled), list(checkpointed)

    def install(self) -> None:
        """Replace the forward pass of the layers, of these objects alone and not of their class."""
        for layer in dict.fromkeys([*self._compiled, *self._checkpointed]):
            forward = partial(_compiled(type(layer)) if layer in self._compiled else type(layer).forward, layer)
            layer.forward = partial(_checkpointed, forward) if layer in self._checkpointed else forward

    def remove(self) -> None:
        """Give the layers their own forward pass back; what was compiled is kept for the next time."""
        for layer in {*self._compiled, *self._checkpointed}:
            layer.__dict__.pop("forward", None)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for the shapes that it meets; a dimension that varies becomes a variable of the code."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function)


_COMPILED: dict[type[nn.Module], Callable[..., Any]] = {}
"""The compiled forward pass of every class of layers met so far."""


def _compiled(kind: type[nn.Module]) -> Callable[..., Any]:
    if kind not in _COMPILED:
        _COMPILED[kind] = compiled(kind.forward)
    return _COMPILED[kind]


def _checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)
