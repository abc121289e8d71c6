"""Dropout inside a bank: one noise mask for the rows of a batch, shared by all K experiments.

So an experiment sees the noise that it would see alone, a bank equals K single runs also with dropout, and a
comparison of experiments shares their noise. `K` experiments, `B` rows of a batch; a tensor of a bank has K·B rows,
K-major.
"""

from typing import Any

import torch
from torch import Tensor, nn

BANK_SIZE = "bank_size"
"""Attribute of an attention module that says for how many experiments its rows are; 1 where it is absent."""


class SharedDropout(nn.Module):
    """Dropout with probability `p` whose mask is drawn for B rows and used for all `bank_size` experiments."""

    def __init__(self, p: float, bank_size: int):
        super().__init__()
        self.p, self.bank_size = p, bank_size

    def forward(self, x: Tensor) -> Tensor:
        """`K·B × …` → the same shape; `x` itself in eval mode."""
        if not self.training or self.p == 0:
            return x
        return apply_mask(x, draw_mask(x, self.p, self.bank_size), self.p)


def draw_mask(x: Tensor, p: float, bank_size: int) -> Tensor:
    """Mask `B × …` (1 or True: kept) for a tensor `K·B × …`, from torch's generator of its device.

    In a compiled graph the numbers come from the compiler's generator: other noise, equally good, and the same for
    every bank size.
    """
    shape = (x.shape[0] // bank_size, *x.shape[1:])
    if torch.compiler.is_compiling():
        return torch.rand(shape, device=x.device) < 1 - p
    kept = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    return kept.bool() if x.element_size() == 2 else kept.div_(1 - p)


def apply_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Drop and rescale `K·B × …` with a mask `B × …` of `draw_mask`.

    A floating-point mask is scaled already. 16-bit values are scaled by a number in fp32: 1 / 0.9 itself has no exact
    16-bit form, and all values would be 0.2 % too small.
    """
    x_KB = x if mask.shape == x.shape else x.view(-1, *mask.shape)
    dropped = x_KB * mask
    return (dropped if mask.is_floating_point() else dropped * (1 / (1 - p))).view_as(x)


def share(model: nn.Module, bank_size: int) -> dict[str, Any]:
    """Replace every `nn.Dropout` of a model; returns what `restore` needs, by module name.

    Modules that draw noise in an attention function (they have a `scaling`) learn the bank's size.
    """
    replaced: dict[str, Any] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout:
            shared = SharedDropout(module.p, bank_size).train(module.training)
            replaced[name] = module
            _set(model, name, shared)
        elif hasattr(module, "scaling"):
            setattr(module, BANK_SIZE, bank_size)
    return replaced


def restore(model: nn.Module, replaced: dict[str, Any]) -> None:
    """Put the dropout modules of `share` back, in the model's present mode."""
    for name, module in replaced.items():
        _set(model, name, module.train(model.get_submodule(name).training))
    for module in model.modules():
        if hasattr(module, BANK_SIZE) and not isinstance(module, SharedDropout):
            delattr(module, BANK_SIZE)


def _set(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
