"""The bank: K experiments' trained tensors inside one frozen model.

All trained tensors of all experiments lie in one matrix `values` (K × P), their gradients in `grads` of the same
shape; the multi-adapter layers hold views of both. So the optimizer is a few operations on a matrix, an experiment is
a row, and leaving the bank is dropping a row.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.adapters import placement as places
from blipfit.adapters.layers import BankEmbedding, BankLayerNorm, BankLinear, BankLoRA
from blipfit.adapters.peft_methods import PEFT_A, PEFT_B, PeftLayers
from blipfit.methods import PEFT
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig
from blipfit.runtime import cpu, dropout

LORA_A, LORA_B, LORA_E = "lora_A", "lora_B", "lora_E"
"""Names of a layer's low-rank tensors; E, the singular values, only in AdaLoRA."""
RANKNUM_EPSILON = 1e-5
"""peft's AdaLoRA divides alpha by the rank plus this."""


MATRICES = 7
"""K × P matrices that training holds: values, gradients, two moments, the best epoch, two while AdamW works."""


@dataclass(frozen=True, slots=True)
class Slot:
    """A trained tensor: its columns in the matrix, its shape in one experiment, whether AdamW decays it."""

    name: str
    start: int
    shape: tuple[int, ...]
    decays: bool

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape)


class Bank:
    """Installs K experiments in a backbone; `remove()` gives the backbone back as it was.

    ValueError where the experiments cannot share a bank: either all train the Q-Former fully or none does, and all
    have the same method; with a method of peft's layers (`methods.PEFT`) there is one experiment. `seeds` are of
    LoRA's A (AdaLoRA: A and B): an experiment's start does not depend on its neighbours.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[AdapterConfig],
        seeds: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ):
        self.backbone, self.adapters = backbone, list(adapters)
        self.placements = [places.resolve(backbone.hf, backbone.family, adapter) for adapter in adapters]
        if len({p.qformer_full for p in self.placements}) > 1:
            raise ValueError("experiments with a fully trained Q-Former and others cannot share a bank")
        if len({adapter.method for adapter in adapters}) > 1:
            raise ValueError("experiments with LoRA and with AdaLoRA cannot share a bank")
        if (method := self.adapters[0].method) in PEFT and len(adapters) > 1:
            raise ValueError(f"{len(adapters)} experiments with {method} cannot share a bank: peft's layers hold one")
        self._originals: dict[str, nn.Module] = {}
        self._dropouts: dict[str, Any] = {}
        self._query_tokens = backbone.hf.query_tokens
        self._peft = PeftLayers(backbone.hf, adapters[0], self.placements[0].lora, seeds[0]) if method in PEFT else None
        try:
            self._allocate(seeds, dtype)
        except BaseException:
            self.remove()
            raise

    def _allocate(self, seeds: Sequence[int], dtype: torch.dtype) -> None:
        self.slots = self._plan()
        P = max((slot.stop for slot in self.slots.values()), default=0)
        self.values = torch.zeros(len(self.adapters), P, dtype=dtype, device=self._query_tokens.device)
        self.grads = torch.zeros_like(self.values)
        self._parameters: dict[str, nn.Parameter] = {}
        self._initialize(seeds)
        self._install()

    # ---------------------------------------------------------------- shape

    @property
    def K(self) -> int:
        return self.values.shape[0]

    @property
    def adaptive(self) -> bool:
        """Whether the experiments are AdaLoRA's."""
        return self.adapters[0].method == "adalora"

    def decay_mask(self) -> Tensor:
        """1 where AdamW decays (matrices), else 0 (biases, norms, vectors); shape P."""
        mask = torch.zeros(self.values.shape[1], dtype=self.values.dtype, device=self.values.device)
        for slot in self.slots.values():
            if slot.decays:
                mask[slot.start : slot.stop] = 1
        return mask

    def _plan(self) -> dict[str, Slot]:
        """Lay the union of all experiments' tensors into columns."""
        slots: dict[str, Slot] = {}

        def add(name: str, shape: Sequence[int], decays: bool = True) -> None:
            start = next(reversed(slots.values())).stop if slots else 0
            # The last feed-forward's text branch too: its gradient is zero, not absent, so torch's AdamW decays it.
            slots[name] = Slot(name, start, tuple(shape), decays=decays and len(shape) > 1)

        add(places.QUERY_TOKENS, self._query_tokens.shape[1:])
        for name in self.placements[0].full:
            for suffix, parameter in self.backbone.hf.get_submodule(name).named_parameters(recurse=False):
                add(f"{name}.{suffix}", parameter.shape)
        if self._peft:
            for name, parameter in self._peft.parameters.items():
                add(name, parameter.shape, PEFT[self.adapters[0].method].decays)
            return slots
        for name, rank in self._lora_ranks().items():
            linear = self.backbone.hf.get_submodule(name)
            add(f"{name}.{LORA_A}", (rank, linear.in_features))
            if self.adaptive:
                add(f"{name}.{LORA_E}", (rank, 1))
            add(f"{name}.{LORA_B}", (linear.out_features, rank))
        return slots

    def _lora_ranks(self) -> dict[str, int]:
        """Every layer that has LoRA in some experiment, with the largest rank there."""
        ranks: dict[str, int] = {}
        for adapter, placed in zip(self.adapters, self.placements, strict=True):
            for name in placed.lora:
                ranks[name] = max(ranks.get(name, 0), adapter.start_rank)
        return ranks

    def _initialize(self, seeds: Sequence[int]) -> None:
        """Trained tensors start as the model's own; A Kaiming-uniform (a = √5), B zero.

        AdaLoRA: A and B from N(0, 0.02²), E zero. peft's layers: as peft starts them, but an A beside a B of zeros as
        LoRA's, so that methods which start alike start from the same numbers.
        """
        layers = self._peft.parameters if self._peft else {}
        for name, slot in self.slots.items():
            if name in layers:
                layer, low, last = name.partition(PEFT_A)
                drawn = low and not layers[f"{layer}{PEFT_B}{last}"].count_nonzero()
                start = layers[name].detach()
                self.tensor(0, name).copy_(_kaiming(start, seeds[0], layer) if drawn else start)
            elif name == places.QUERY_TOKENS:
                self.columns(self.values, slot).copy_(self._query_tokens.detach()[0])
            elif not name.endswith((LORA_A, LORA_B, LORA_E)):
                self.columns(self.values, slot).copy_(self.backbone.hf.get_parameter(name).detach())
        if self._peft:
            return
        for k, (placed, seed) in enumerate(zip(self.placements, seeds, strict=True)):
            for name in placed.lora:
                A, B = self.tensor(k, f"{name}.{LORA_A}"), self.tensor(k, f"{name}.{LORA_B}")
                if self.adaptive:
                    A.copy_(_normal(A, seed, f"{name}.{LORA_A}"))
                    B.copy_(_normal(B, seed, f"{name}.{LORA_B}"))
                else:
                    A.copy_(_kaiming(A, seed, name))

    # -------------------------------------------------------------- install

    def _install(self) -> None:
        layers = self._peft.parameters if self._peft else {}
        for slot in self.slots.values():
            if slot.name in layers:
                layers[slot.name].data = self.tensor(0, slot.name)
                layers[slot.name].grad = self.tensor(0, slot.name, self.grads)
                continue
            parameter = nn.Parameter(self.columns(self.values, slot))
            parameter.grad = self.columns(self.grads, slot)
            self._parameters[slot.name] = parameter
        self.backbone.hf.query_tokens = self._parameters[places.QUERY_TOKENS]
        for name in self.placements[0].full:
            self._replace(name, self._trained(name))
        for name in self._lora_ranks() if self._peft is None else ():
            self._replace(name, self._adapted(name))
        self._dropouts = {
            part: dropout.share(getattr(self.backbone.hf, part), self.K) for part in ("qformer", "language_model")
        }

    def _trained(self, name: str) -> nn.Module:
        base = self.backbone.hf.get_submodule(name)
        weight, bias = self._parameters[f"{name}.weight"], self._parameters.get(f"{name}.bias")
        if isinstance(base, nn.Linear):
            return BankLinear(weight, bias)
        if isinstance(base, nn.Embedding):
            return BankEmbedding(weight)
        assert isinstance(base, nn.LayerNorm)
        assert bias is not None
        return BankLayerNorm(weight, bias, base.eps)

    def _adapted(self, name: str) -> BankLoRA:
        base = self.backbone.hf.get_submodule(name)
        A, B = self._parameters[f"{name}.{LORA_A}"], self._parameters[f"{name}.{LORA_B}"]
        return BankLoRA(base, A, B, *self._scales(name), self._parameters.get(f"{name}.{LORA_E}"))

    def _scales(self, name: str) -> tuple[Tensor, slice]:
        """alpha / rank of every experiment at a layer (0 without LoRA), and the span of those with it."""
        has = [name in placed.lora for placed in self.placements]
        more = RANKNUM_EPSILON if self.adaptive else 0.0
        ranks = [adapter.start_rank + more for adapter in self.adapters]
        scales = [a.alpha / r if there else 0.0 for a, r, there in zip(self.adapters, ranks, has, strict=True)]
        span = slice(has.index(True), len(has) - has[::-1].index(True)) if any(has) else slice(0, 0)
        return torch.tensor(scales, dtype=self.values.dtype, device=self.values.device), span

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        owner = self.backbone.hf.get_submodule(parent)
        self._originals[name] = getattr(owner, child)
        setattr(owner, child, module)

    def remove(self) -> None:
        """Take the bank out: the backbone has its own modules and query tokens again."""
        for part, replaced in self._dropouts.items():
            dropout.restore(getattr(self.backbone.hf, part), replaced)
        self._dropouts = {}
        for name, module in reversed(self._originals.items()):
            parent, _, child = name.rpartition(".")
            setattr(self.backbone.hf.get_submodule(parent), child, module)
        self._originals.clear()
        self.backbone.hf.query_tokens = self._query_tokens
        if self._peft:
            self._peft.remove()

    def keep(self, indices: Sequence[int]) -> None:
        """Keep only these experiments, in this order."""
        rows = list(indices)
        if self._peft:
            if rows != [0]:
                raise ValueError(f"a bank of one experiment cannot keep {rows}")
            return
        self.remove()
        self.adapters = [self.adapters[k] for k in rows]
        self.placements = [self.placements[k] for k in rows]
        self.values, self.grads = self.values[rows].clone(), torch.zeros_like(self.values[rows])
        self._install()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to `grads`; experiments do not touch each other's rows."""
        with cpu.products(loss.device.type), warnings.catch_warnings():
            # Each gradient is a view of a matrix, as wanted; torch warns that such a layout suits its DDP less.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            loss.backward()  # type: ignore[no-untyped-call]

    # -------------------------------------------------------------- tensors

    def tensor(self, k: int, name: str, source: Tensor | None = None) -> Tensor:
        """Experiment k's own tensor (a view, padding cut off), from `values` or a matrix of its shape."""
        slot = self.slots[name]
        view = (self.values if source is None else source)[k, slot.start : slot.stop].view(slot.shape)
        if name.endswith((LORA_A, LORA_E)):
            return view[: self.adapters[k].start_rank]
        return view[:, : self.adapters[k].start_rank] if name.endswith(LORA_B) else view

    def names(self, k: int) -> Iterator[str]:
        """Names of the tensors that experiment k really trains."""
        layers = set(self.placements[k].lora)
        for name in self.slots:
            layer, _, last = name.rpartition(".")
            if last not in (LORA_A, LORA_B, LORA_E) or layer in layers:
                yield name

    def state(self, k: int, source: Tensor | None = None) -> dict[str, Tensor]:
        """Experiment k's tensors by name, copied; independent of the bank's other experiments."""
        return {name: self.tensor(k, name, source).detach().clone().contiguous() for name in self.names(k)}

    def load_state(self, k: int, state: Mapping[str, Tensor], target: Tensor | None = None) -> None:
        """Put tensors back; ValueError where names or shapes are not this experiment's."""
        wanted = set(self.names(k))
        if wanted != set(state):
            missing, odd = sorted(wanted - set(state)), sorted(set(state) - wanted)
            raise ValueError(f"state does not fit the experiment: missing {missing[:3]}, unexpected {odd[:3]}")
        for name, tensor in state.items():
            view = self.tensor(k, name, target)
            if view.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(view.shape)}")
            view.detach().copy_(tensor)

    def trained_parameters(self, k: int) -> dict[str, int]:
        """Trained parameters of experiment k by component."""
        counts: dict[str, int] = {}
        for name in self.names(k):
            part = places.component(name)
            counts[part] = counts.get(part, 0) + self.tensor(k, name).numel()
        return counts

    def columns(self, matrix: Tensor, slot: Slot) -> Tensor:
        """All experiments' tensors of a slot: a view `K × shape` of `values` or a matrix of its shape."""
        return matrix[:, slot.start : slot.stop].view(matrix.shape[0], *slot.shape)


def _kaiming(like: Tensor, seed: int, name: str) -> Tensor:
    """Kaiming-uniform (a = √5) from a generator of (seed, layer): the same start in any bank, on any device."""
    start = torch.empty(like.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=_generator(seed, name))
    return start.to(like)


def _normal(like: Tensor, seed: int, name: str) -> Tensor:
    return torch.empty(like.shape).normal_(std=0.02, generator=_generator(seed, name)).to(like)


def _generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
