"""The bank: the trained tensors of K experiments inside a single frozen model.

All trained tensors of all experiments are in one matrix `values` (K × P), their gradients in `grads` of the same shape;
the multi-adapter layers hold views of both. An optimizer step is therefore a few operations on a matrix, an experiment
is a row. When an experiment leaves, the bank is made anew without it.

Dimensions: `K` experiments, `P` trained parameters of an experiment (columns), `r` largest rank of a layer, `I` inputs
and `O` outputs of a layer; A `r × I`, E `r × 1`, B `O × r`.
"""

import hashlib
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.adapters.layers import BankEmbedding, BankLayerNorm, BankLinear, BankLoRA
from blipfit.adapters.peft_layers import PEFT_A, PEFT_B, PeftLayers
from blipfit.adapters.placement import QUERY_TOKENS, component_of, resolve
from blipfit.methods import PEFT
from blipfit.model.backbone import Backbone
from blipfit.recipe import AdapterConfig
from blipfit.runtime import onednn, shared_dropout

LORA_A, LORA_B, LORA_E = "lora_A", "lora_B", "lora_E"
"""Names of a layer's low-rank tensors; E, the singular values, exists only in AdaLoRA."""
RANKNUM_EPSILON = 1e-5
"""peft's AdaLoRA divides alpha by the rank plus this number."""
TRAINING_MATRICES = 7
"""Number of K × P matrices that training holds: values, gradients, two moments, the best epoch, two inside AdamW."""


@dataclass(frozen=True, slots=True)
class Slot:
    """The place of a trained tensor in the bank's matrix."""

    name: str
    """The parameter's name in the model, or the layer's name with `lora_A`, `lora_B` or `lora_E`."""
    start: int
    """Its first column."""
    shape: tuple[int, ...]
    """Its shape in a single experiment, with the largest rank in the bank."""
    decays: bool
    """Whether AdamW applies weight decay to it."""

    @property
    def stop(self) -> int:
        """The column after its last one."""
        return self.start + math.prod(self.shape)


class Bank:
    """K experiments installed in a backbone; `remove()` restores the backbone.

    `adapters`: the adapter of each experiment. `seeds`: for each experiment the seed of its random initialization
    (LoRA: A; AdaLoRA: A and B); it does not depend on the other experiments. `dtype`: of all trained tensors.

    Raises ValueError if the experiments cannot share a bank: either all or none train the Q-Former fully, all have the
    same method, and with a method of peft's layers (`methods.PEFT`) there is a single experiment. Raises UserError and
    ValueError as `placement.resolve`, and UserError as `PeftLayers`.
    """

    def __init__(
        self,
        backbone: Backbone,
        adapters: Sequence[AdapterConfig],
        seeds: Sequence[int],
        dtype: torch.dtype = torch.float32,
    ):
        self.backbone, self.adapters = backbone, list(adapters)
        self.placements = [resolve(backbone.hf, backbone.family, adapter) for adapter in adapters]
        if len({placement.qformer_full for placement in self.placements}) > 1:
            raise ValueError("experiments with a fully trained Q-Former and others cannot share a bank")
        if len(methods := {adapter.method for adapter in adapters}) > 1:
            raise ValueError(f"experiments with different methods ({', '.join(sorted(methods))}) cannot share a bank")
        if (method := self.adapters[0].method) in PEFT and len(adapters) > 1:
            raise ValueError(
                f"{len(adapters)} experiments with {method} cannot share a bank: peft's layers hold only one"
            )
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
        """Allocate the matrices, initialize the trained tensors, and install them in the backbone."""
        self.slots = self._plan_slots()
        """The slot of every trained tensor by its name, in the order of the columns."""
        P = max((slot.stop for slot in self.slots.values()), default=0)
        self.values = torch.zeros(len(self.adapters), P, dtype=dtype, device=self._query_tokens.device)
        self.grads = torch.zeros_like(self.values)
        self._parameters: dict[str, nn.Parameter] = {}
        self._initialize(seeds)
        self._install()

    @property
    def K(self) -> int:
        """The number of experiments."""
        return len(self.values)

    @property
    def is_adalora(self) -> bool:
        """Whether the experiments' method is AdaLoRA."""
        return self.adapters[0].method == "adalora"

    def decay_mask(self) -> Tensor:
        """A vector of P numbers: 1 where AdamW applies weight decay (matrices), else 0 (biases, norms, vectors)."""
        mask = torch.zeros(self.values.shape[1], dtype=self.values.dtype, device=self.values.device)
        for slot in self.slots.values():
            if slot.decays:
                mask[slot.start : slot.stop] = 1
        return mask

    def _plan_slots(self) -> dict[str, Slot]:
        """Assign columns to the trained tensors that at least one experiment has."""
        slots: dict[str, Slot] = {}

        def add(name: str, shape: Sequence[int], decays: bool = True) -> None:
            start = next(reversed(slots.values())).stop if slots else 0
            # Also the text branch of the last feed-forward: its gradient is zero, not None, so torch's AdamW decays it.
            slots[name] = Slot(name, start, tuple(shape), decays=decays and len(shape) > 1)

        add(QUERY_TOKENS, self._query_tokens.shape[1:])
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
            if self.is_adalora:
                add(f"{name}.{LORA_E}", (rank, 1))
            add(f"{name}.{LORA_B}", (linear.out_features, rank))
        return slots

    def _lora_ranks(self) -> dict[str, int]:
        """The largest rank of every layer that has LoRA in at least one experiment."""
        ranks: dict[str, int] = {}
        for adapter, placement in zip(self.adapters, self.placements, strict=True):
            for name in placement.lora:
                ranks[name] = max(ranks.get(name, 0), adapter.start_rank)
        return ranks

    def _initialize(self, seeds: Sequence[int]) -> None:
        """Set the initial values: the model's own weights, A Kaiming-uniform (a = √5), B zero.

        AdaLoRA: A and B from N(0, 0.02²), E zero. peft's layers: as peft initializes them; but if B is zero, A is
        initialized as LoRA's, so that these methods start from the same numbers as LoRA.
        """
        peft_parameters = self._peft.parameters if self._peft else {}
        for name, slot in self.slots.items():
            if name in peft_parameters:  # a bank with peft's layers has one experiment, number 0
                layer, separator, adapter_name = name.partition(PEFT_A)
                starts_as_lora = separator and not peft_parameters[f"{layer}{PEFT_B}{adapter_name}"].count_nonzero()
                start = peft_parameters[name].detach()
                self.tensor(0, name).copy_(_sample_kaiming(start, seeds[0], layer) if starts_as_lora else start)
            elif name == QUERY_TOKENS:
                self.columns(self.values, slot).copy_(self._query_tokens.detach()[0])
            elif not name.endswith((LORA_A, LORA_B, LORA_E)):
                self.columns(self.values, slot).copy_(self.backbone.hf.get_parameter(name).detach())
        if self._peft:
            return
        for k, (placement, seed) in enumerate(zip(self.placements, seeds, strict=True)):
            for name in placement.lora:
                A, B = self.tensor(k, f"{name}.{LORA_A}"), self.tensor(k, f"{name}.{LORA_B}")
                if self.is_adalora:
                    A.copy_(_sample_normal(A, seed, f"{name}.{LORA_A}"))
                    B.copy_(_sample_normal(B, seed, f"{name}.{LORA_B}"))
                else:
                    A.copy_(_sample_kaiming(A, seed, name))

    def _install(self) -> None:
        """Replace the trained modules of the backbone by multi-adapter layers that hold views of the matrices."""
        peft_parameters = self._peft.parameters if self._peft else {}
        for slot in self.slots.values():
            if slot.name in peft_parameters:
                peft_parameters[slot.name].data = self.tensor(0, slot.name)
                peft_parameters[slot.name].grad = self.tensor(0, slot.name, self.grads)
                continue
            parameter = nn.Parameter(self.columns(self.values, slot))
            parameter.grad = self.columns(self.grads, slot)
            self._parameters[slot.name] = parameter
        self.backbone.hf.query_tokens = self._parameters[QUERY_TOKENS]
        for name in self.placements[0].full:
            self._replace(name, self._make_trained_module(name))
        for name in self._lora_ranks() if self._peft is None else ():
            self._replace(name, self._make_lora_layer(name))
        self._dropouts = {
            part: shared_dropout.share_masks(self.backbone.hf.get_submodule(part), self.K)
            for part in ("qformer", "language_model")
        }

    def _make_trained_module(self, name: str) -> nn.Module:
        """The multi-adapter layer for a module whose own weights are trained."""
        base = self.backbone.hf.get_submodule(name)
        weight, bias = self._parameters[f"{name}.weight"], self._parameters.get(f"{name}.bias")
        if isinstance(base, nn.Linear):
            return BankLinear(weight, bias)
        if isinstance(base, nn.Embedding):
            return BankEmbedding(weight)
        assert isinstance(base, nn.LayerNorm)
        assert bias is not None
        return BankLayerNorm(weight, bias, base.eps)

    def _make_lora_layer(self, name: str) -> BankLoRA:
        """The multi-adapter layer for a linear layer with LoRA."""
        base = self.backbone.hf.get_submodule(name)
        A, B = self._parameters[f"{name}.{LORA_A}"], self._parameters[f"{name}.{LORA_B}"]
        return BankLoRA(base, A, B, *self._lora_scales(name), self._parameters.get(f"{name}.{LORA_E}"))

    def _lora_scales(self, name: str) -> tuple[Tensor, slice]:
        """alpha / rank of every experiment at a layer, shape K, and the span of the experiments with LoRA there.

        The scale is 0 for experiments without LoRA there. The span reaches from the first to the last with LoRA.
        """
        has_lora = [name in placement.lora for placement in self.placements]
        epsilon = RANKNUM_EPSILON if self.is_adalora else 0.0
        ranks = [adapter.start_rank + epsilon for adapter in self.adapters]
        scales = [
            adapter.alpha / rank if adapted else 0.0
            for adapter, rank, adapted in zip(self.adapters, ranks, has_lora, strict=True)
        ]
        span = slice(0, 0)
        if any(has_lora):
            span = slice(has_lora.index(True), len(has_lora) - has_lora[::-1].index(True))
        return torch.tensor(scales, dtype=self.values.dtype, device=self.values.device), span

    def _replace(self, name: str, module: nn.Module) -> None:
        """Replace a module of the backbone and remember the original for `remove`."""
        parent, _, child = name.rpartition(".")
        owner = self.backbone.hf.get_submodule(parent)
        self._originals[name] = getattr(owner, child)
        setattr(owner, child, module)

    def remove(self) -> None:
        """Remove the bank from the backbone, which has its own modules and query tokens again."""
        for part, replaced_modules in self._dropouts.items():
            shared_dropout.restore_modules(self.backbone.hf.get_submodule(part), replaced_modules)
        self._dropouts = {}
        for name, module in reversed(self._originals.items()):
            parent, _, child = name.rpartition(".")
            setattr(self.backbone.hf.get_submodule(parent), child, module)
        self._originals.clear()
        self.backbone.hf.query_tokens = self._query_tokens
        if self._peft:
            self._peft.remove()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar loss to `grads`; an experiment's loss changes only its own row."""
        with onednn.onednn_products(loss.device.type), warnings.catch_warnings():
            # Each gradient is a view of a matrix by design; torch warns that its DDP is slower with such a layout.
            warnings.filterwarnings("ignore", message="grad and param do not obey the gradient layout contract")
            loss.backward()

    def tensor(self, k: int, name: str, source: Tensor | None = None) -> Tensor:
        """A view of experiment k's tensor, without the padding of smaller ranks.

        `source`: a matrix `K × P` to take it from instead of `values`.
        """
        slot = self.slots[name]
        view = (self.values if source is None else source)[k, slot.start : slot.stop].view(slot.shape)
        if name.endswith((LORA_A, LORA_E)):
            return view[: self.adapters[k].start_rank]
        return view[:, : self.adapters[k].start_rank] if name.endswith(LORA_B) else view

    def tensor_names(self, k: int) -> Iterator[str]:
        """Names of the tensors that experiment k trains: not those of layers that only other experiments adapt."""
        layers = set(self.placements[k].lora)
        for name in self.slots:
            layer, _, last = name.rpartition(".")
            if last not in (LORA_A, LORA_B, LORA_E) or layer in layers:
                yield name

    def state(self, k: int, source: Tensor | None = None) -> dict[str, Tensor]:
        """Copies of experiment k's tensors by name; they do not depend on the bank's other experiments.

        `source`: a matrix `K × P` to take them from instead of `values`.
        """
        return {name: self.tensor(k, name, source).detach().clone().contiguous() for name in self.tensor_names(k)}

    def load_state(self, k: int, state: Mapping[str, Tensor], target: Tensor | None = None) -> None:
        """Copy tensors, as returned by `state`, to experiment k.

        `target`: a matrix `K × P` to copy them to instead of `values`. Raises ValueError if names or shapes are not
        this experiment's.
        """
        expected_names = set(self.tensor_names(k))
        if expected_names != set(state):
            missing, unexpected = sorted(expected_names - set(state)), sorted(set(state) - expected_names)
            raise ValueError(f"state does not fit the experiment: missing {missing[:3]}, unexpected {unexpected[:3]}")
        for name, tensor in state.items():
            view = self.tensor(k, name, target)
            if view.shape != tensor.shape:
                raise ValueError(f"{name} is {tuple(tensor.shape)}, expected {tuple(view.shape)}")
            view.detach().copy_(tensor)

    def trained_parameters(self, k: int) -> dict[str, int]:
        """The number of parameters that experiment k trains, by component."""
        counts: dict[str, int] = {}
        for name in self.tensor_names(k):
            component = component_of(name)
            counts[component] = counts.get(component, 0) + self.tensor(k, name).numel()
        return counts

    def columns(self, matrix: Tensor, slot: Slot) -> Tensor:
        """The tensors of all experiments at a slot: a view `K × slot.shape` of a matrix `K × P`."""
        return matrix[:, slot.start : slot.stop].view(matrix.shape[0], *slot.shape)


def _sample_kaiming(like: Tensor, seed: int, name: str) -> Tensor:
    """Kaiming-uniform numbers (a = √5) like a tensor (shape, dtype, device), the same in any bank, on any device."""
    start = torch.empty(like.shape, dtype=torch.float32)
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=_make_generator(seed, name))
    return start.to(like)


def _sample_normal(like: Tensor, seed: int, name: str) -> Tensor:
    """Numbers from N(0, 0.02²) like a tensor (shape, dtype, device), the same in any bank, on any device."""
    return torch.empty(like.shape).normal_(std=0.02, generator=_make_generator(seed, name)).to(like)


def _make_generator(seed: int, name: str) -> torch.Generator:
    """A random generator for this seed and tensor."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
