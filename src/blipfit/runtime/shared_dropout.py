"""Dropout inside a bank: one noise mask for the rows of a batch, shared by all K experiments.

Each experiment therefore has the noise that it would have alone: a bank of K experiments equals K separate trainings
also with dropout, and experiments are compared under the same noise.

Several processes share the rows of a batch. Each samples the noise of the whole batch and takes that of its own rows
(`batch_rows`), so the noise does not depend on the number of processes.

Dimensions: `K` experiments in the bank, `B` rows of the batch (with several processes: this process's rows). A tensor
of a bank has K·B rows: first all B rows of experiment 0, then those of experiment 1, and so on (K-major). `…` stands
for any further dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BANK_SIZE = "bank_size"
"""Name of the attribute that tells an attention module the number of experiments K; absent means 1."""
_whole_batch: tuple[int, slice] | None = None
"""The number of rows of the whole batch and this process's part of them; None if this process has all rows.

A variable of the process, not of a thread: on a GPU, checkpointed layers are computed again in autograd's own thread.
"""


@contextmanager
def batch_rows(count: int, rows: slice) -> Iterator[None]:
    """Inside this context, tensors hold only the rows `rows` of a batch of `count` rows; also wrap the backward pass.

    Dropout noise is then a part of the noise that a process with all rows has.
    """
    global _whole_batch
    previous = _whole_batch
    _whole_batch = None if range(count)[rows] == range(count) else (count, rows)
    try:
        yield
    finally:
        _whole_batch = previous


class SharedDropout(nn.Module):
    """Dropout with probability `p` that samples a mask for B rows and uses it for all `bank_size` experiments."""

    def __init__(self, p: float, bank_size: int):
        super().__init__()
        self.p, self.bank_size = p, bank_size

    def forward(self, x: Tensor) -> Tensor:
        """Apply dropout to `x` (`K·B × …`); in eval mode or with p = 0 `x` itself is returned."""
        if not self.training or self.p == 0:
            return x
        return apply_mask(x, sample_mask(x, self.p, self.bank_size), self.p)


def sample_mask(x: Tensor, p: float, bank_size: int) -> Tensor:
    """Sample a dropout mask `B × …` for a tensor `x` of shape `K·B × …` from torch's generator of its device.

    `p`: probability that an element is dropped. `bank_size`: K.

    Returns for 16-bit `x` a bool mask (True: the element stays), otherwise a mask of `x`'s dtype that is already
    scaled: 0 or 1 / (1 - p). In a compiled graph it is always bool, and the numbers come from the compiler's generator:
    other noise of the same distribution, and the same noise for every bank size.
    """
    count, rows = _whole_batch or (x.shape[0] // bank_size, slice(None))
    shape = (count, *x.shape[1:])
    if torch.compiler.is_compiling():
        noise = torch.rand(shape, device=x.device)
        return (noise if _whole_batch is None else noise[rows]) < 1 - p
    mask = torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p)
    if x.element_size() == 2:
        return mask[rows].bool()
    # A copy, so that the other rows of the noise are freed.
    return mask.div_(1 - p) if _whole_batch is None else mask[rows].div(1 - p)


def apply_mask(x: Tensor, mask: Tensor, p: float) -> Tensor:
    """Drop and rescale the elements of `x` (`K·B × …`) with a mask `B × …` of `sample_mask`.

    `p`: the probability that the mask was sampled with. A floating-point mask is scaled already. With a bool mask the
    scale is a Python number, which torch applies in fp32 also to 16-bit values: 1 / 0.9 itself has no exact 16-bit
    form, and all values would be 0.2 % too small.
    """
    x_KB = x if mask.shape == x.shape else x.view(-1, *mask.shape)
    masked_KB = x_KB * mask
    return (masked_KB if mask.is_floating_point() else masked_KB * (1 / (1 - p))).view_as(x)


def share_masks(model: nn.Module, bank_size: int) -> dict[str, Any]:
    """Replace every `nn.Dropout` of a model by `SharedDropout`.

    Modules that sample noise in an attention function (they have an attribute `scaling`) get the bank's size as an
    attribute. Returns the replaced modules by name, for `restore_modules`.
    """
    replaced_modules: dict[str, Any] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if type(module) is nn.Dropout:
            shared_dropout = SharedDropout(module.p, bank_size).train(module.training)
            replaced_modules[name] = module
            _set_module(model, name, shared_dropout)
        elif hasattr(module, "scaling"):
            setattr(module, BANK_SIZE, bank_size)
    return replaced_modules


def restore_modules(model: nn.Module, replaced_modules: dict[str, Any]) -> None:
    """Put back the dropout modules that `share_masks` replaced, in the model's present mode (training or eval)."""
    for name, module in replaced_modules.items():
        _set_module(model, name, module.train(model.get_submodule(name).training))
    for module in model.modules():
        if hasattr(module, BANK_SIZE) and not isinstance(module, SharedDropout):
            delattr(module, BANK_SIZE)


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
