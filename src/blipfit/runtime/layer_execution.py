"""How the layers of a model run in training: unchanged, compiled, or with activation checkpointing.

Compilation is regional: `torch.compile` compiles the forward pass of a single layer, and all layers of the same class
share the result. That takes about a minute; compiling the whole model takes several. Activation checkpointing stores
only a layer's input and computes the rest again in the backward pass.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

RECOMPILE_LIMIT = 64
"""Number of compiled variants of a layer's forward pass that torch may keep.

Variants differ in the layer (first or later, with or without cross-attention), in sequence lengths and in the number
of experiments in the bank.
"""


class LayerExecution:
    """Layers that run compiled, checkpointed or both while this is installed; call them with gradients enabled."""

    def __init__(self, compiled: Iterable[nn.Module] = (), checkpointed: Iterable[nn.Module] = ()):
        self._compiled, self._checkpointed = list(compiled), list(checkpointed)

    def install(self) -> None:
        """Replace the forward pass of these layer objects; other layers of the same class stay unchanged."""
        for layer in dict.fromkeys([*self._compiled, *self._checkpointed]):
            layer_class = type(layer)
            forward = partial(_compile_forward(layer_class) if layer in self._compiled else layer_class.forward, layer)
            layer.forward = partial(_run_checkpointed, forward) if layer in self._checkpointed else forward

    def remove(self) -> None:
        """Restore the forward pass of the layers; the compiled code is kept for the next `install`."""
        for layer in {*self._compiled, *self._checkpointed}:
            layer.__dict__.pop("forward", None)


def compile_function(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for the shapes of its inputs; a dimension that varies becomes a variable in the code."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILE_LIMIT)
    return torch.compile(function)


_COMPILED: dict[type[nn.Module], Callable[..., Any]] = {}
"""The compiled forward pass of every class of layers that was compiled so far."""


def _compile_forward(layer_class: type[nn.Module]) -> Callable[..., Any]:
    if layer_class not in _COMPILED:
        _COMPILED[layer_class] = compile_function(layer_class.forward)
    return _COMPILED[layer_class]


def _run_checkpointed(forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*inputs, **options)
    return checkpoint(partial(forward, **options), *inputs, use_reentrant=False)
