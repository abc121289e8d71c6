"""Adapter methods that peft's own layers carry out, as `blipfit.methods.PEFT` lists them.

A bank lays their tensors into its matrix like its own, so training, checkpoints and evaluation know no difference.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.adapters import placement as places
from blipfit.errors import UserError
from blipfit.methods import PEFT
from blipfit.recipe import AdapterConfig

PEFT_A, PEFT_B = ".lora_A.", ".lora_B."
"""What tells the low-rank matrices by their names."""


class PeftLayers:
    """peft's layers around the named linear layers of a model, as at the start of training.

    `parameters` are their tensors by the names under which peft stores them. All that peft draws comes from the seed.
    `remove()` gives the model back as it was, weights that peft had changed included. UserError where a layer is
    smaller than the rank that the method takes out of it.
    """

    def __init__(self, model: nn.Module, adapter: AdapterConfig, layers: Sequence[str], seed: int = 0):
        from peft import get_peft_model_state_dict, inject_adapter_in_model

        self._model = model
        self._originals: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        spectral = PEFT[adapter.method].spectral
        if spectral:
            _refuse_small(self._originals, adapter)
        self._weights = {name: linear.weight.data for name, linear in self._originals.items() if spectral}
        self._required = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        shapes_only = any(parameter.is_meta for parameter, _ in self._required)
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # peft asks transformers for a property that it is about to rename.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                torch.random.default_generator.manual_seed(seed)
                inject_adapter_in_model(configuration(adapter, layers), model, low_cpu_mem_usage=shapes_only)
            everything = dict(model.named_parameters())
            self.parameters: dict[str, nn.Parameter] = get_peft_model_state_dict(
                model, everything, save_embedding_layers=False
            )
            self._check_wrapped()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take them out; once is enough, more does nothing."""
        for name, module in self._originals.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)
            if name in self._weights:
                module.weight.data = self._weights[name]
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        if self._originals and hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._originals, self._weights, self._required = {}, {}, []

    def _check_wrapped(self) -> None:
        """peft matches by the end of a name and is silent about what it misses."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        wrapped = {name for name, module in self._model.named_modules() if isinstance(module, BaseTunerLayer)}
        assert wrapped == set(self._originals), wrapped ^ set(self._originals)
        for name, original in self._originals.items():
            self._model.get_submodule(name).train(original.training)


def configuration(adapter: AdapterConfig, layers: Sequence[str], **more: Any) -> Any:
    """peft's configuration of a method at exactly these layers; `more` are further arguments of its class."""
    import peft

    method = PEFT[adapter.method]
    options = {theirs: getattr(adapter, ours) for ours, theirs in method.reads.items()}
    if method.feedforward is not None:
        options[method.feedforward] = [name for name in layers if places.feedforward(name)]
    return getattr(peft, method.config)(target_modules=list(layers), **options, **method.options, **more)


def stored(method: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of an experiment's tensors those that peft stores."""
    mark = _mark(method)
    return {name: tensor for name, tensor in state.items() if mark in name}


def saved_configuration(adapter: AdapterConfig, tensors: Mapping[str, Tensor], base: str) -> Any:
    """The configuration to store beside tensors of `stored`."""
    mark = _mark(adapter.method)
    layers = sorted({name.partition(mark)[0] for name in tensors})
    return configuration(adapter, layers, base_model_name_or_path=base, inference_mode=True)


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether some tensor moved that makes a difference: an A beside a B of zeros makes none."""
    return any(
        not before[name].cpu().equal(tensor.to(before[name].dtype).cpu())
        for name, tensor in after.items()
        if PEFT_A not in name or bool(after[name.replace(PEFT_A, PEFT_B)].count_nonzero())
    )


def _mark(method: str) -> str:
    """How peft's tensors of a method are told by their names."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    return "." + PEFT_TYPE_TO_PREFIX_MAPPING[getattr(peft, PEFT[method].config)().peft_type]


def _refuse_small(linears: Mapping[str, Any], adapter: AdapterConfig) -> None:
    for name, linear in linears.items():
        if adapter.rank > (most := min(linear.in_features, linear.out_features)):
            raise UserError(
                f"{adapter.method} cannot take rank {adapter.rank} out of {name}, which has {most} singular values; "
                "lower adapter.rank"
            )
