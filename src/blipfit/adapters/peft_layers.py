"""Adapter methods that use peft's own layers; `blipfit.methods.PEFT` lists them.

A bank holds their tensors in its matrix like its own, so training, checkpoints and evaluation treat all methods alike.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from blipfit.adapters import placement
from blipfit.errors import UserError
from blipfit.methods import PEFT
from blipfit.recipe import AdapterConfig

PEFT_A, PEFT_B = ".lora_A.", ".lora_B."
"""Parts of the names of peft's low-rank matrices."""


class PeftLayers:
    """peft's layers around the named linear layers of a model, as they are at the start of training.

    `layers`: exact module names. `seed`: of all random numbers that peft uses. `parameters` are the layers' tensors by
    the names under which peft stores them. `remove()` restores the model, with the weights that peft changed. Raises
    UserError if the method starts from singular vectors and a layer has fewer than the rank.
    """

    def __init__(self, model: nn.Module, adapter: AdapterConfig, layers: Sequence[str], seed: int = 0):
        from peft import get_peft_model_state_dict, inject_adapter_in_model

        self._model = model
        self._originals: dict[str, Any] = {name: model.get_submodule(name) for name in layers}
        spectral = PEFT[adapter.method].spectral
        if spectral:
            _check_rank(self._originals, adapter)
        self._weights = {name: linear.weight.data for name, linear in self._originals.items() if spectral}
        self._requires_grad = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        on_meta = any(parameter.is_meta for parameter, _ in self._requires_grad)
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # peft reads a property that transformers is about to rename.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
                torch.random.default_generator.manual_seed(seed)
                inject_adapter_in_model(make_config(adapter, layers), model, low_cpu_mem_usage=on_meta)
            all_parameters = dict(model.named_parameters())
            self.parameters: dict[str, nn.Parameter] = get_peft_model_state_dict(
                model, all_parameters, save_embedding_layers=False
            )
            self._check_wrapped()
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Restore the model's own layers and weights; a second call does nothing."""
        for name, module in self._originals.items():
            parent, _, child = name.rpartition(".")
            setattr(self._model.get_submodule(parent), child, module)
            if name in self._weights:
                module.weight.data = self._weights[name]
        for parameter, requires_grad in self._requires_grad:
            parameter.requires_grad_(requires_grad)
        if self._originals and hasattr(self._model, "peft_config"):
            del self._model.peft_config
        self._originals, self._weights, self._requires_grad = {}, {}, []

    def _check_wrapped(self) -> None:
        """Check that peft wrapped exactly the named layers: it matches name endings and does not report a miss."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        wrapped_names = {name for name, module in self._model.named_modules() if isinstance(module, BaseTunerLayer)}
        assert wrapped_names == set(self._originals), wrapped_names ^ set(self._originals)
        for name, original in self._originals.items():
            self._model.get_submodule(name).train(original.training)


def make_config(adapter: AdapterConfig, layers: Sequence[str], **options: Any) -> Any:
    """Make peft's configuration of the adapter's method for exactly these layers.

    `options`: further arguments of peft's configuration class.
    """
    import peft

    method = PEFT[adapter.method]
    arguments = {peft_name: getattr(adapter, field) for field, peft_name in method.rank_fields.items()}
    if method.feedforward is not None:
        arguments[method.feedforward] = [name for name in layers if placement.is_feedforward(name)]
    return getattr(peft, method.config)(target_modules=list(layers), **arguments, **method.options, **options)


def select_peft_tensors(method: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Select from an experiment's tensors those that belong to peft's layers."""
    marker = _name_marker(method)
    return {name: tensor for name, tensor in state.items() if marker in name}


def make_saved_config(adapter: AdapterConfig, tensors: Mapping[str, Tensor], base: str) -> Any:
    """Make the configuration that is saved with the tensors of `select_peft_tensors`.

    `base`: name of the model that the adapter was trained on.
    """
    marker = _name_marker(adapter.method)
    layers = sorted({name.partition(marker)[0] for name in tensors})
    return make_config(adapter, layers, base_model_name_or_path=base, inference_mode=True)


def changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether training changed a tensor that has an effect; an A has none while its B is zero."""
    return any(
        not before[name].cpu().equal(tensor.to(before[name].dtype).cpu())
        for name, tensor in after.items()
        if PEFT_A not in name or bool(after[name.replace(PEFT_A, PEFT_B)].count_nonzero())
    )


def _name_marker(method: str) -> str:
    """The part of a name by which a method's tensors are recognized, for example `.lora_`."""
    import peft
    from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

    prefix: str = PEFT_TYPE_TO_PREFIX_MAPPING[getattr(peft, PEFT[method].config)().peft_type]
    return f".{prefix}"


def _check_rank(linears: Mapping[str, Any], adapter: AdapterConfig) -> None:
    """Raise UserError if a layer has fewer singular values than the adapter's rank."""
    for name, linear in linears.items():
        if adapter.rank > (largest_rank := min(linear.in_features, linear.out_features)):
            raise UserError(
                f"{adapter.method} cannot take rank {adapter.rank} out of {name}, which has {largest_rank} singular "
                f"values; lower adapter.rank to {largest_rank} or less"
            )
