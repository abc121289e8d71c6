"""Count the parameters of a model and those that an experiment trains, without loading weights."""

from typing import Any

from torch import nn

from blipfit.adapters.peft_layers import PeftLayers
from blipfit.adapters.placement import QUERY_TOKENS, component_of, resolve
from blipfit.methods import PEFT
from blipfit.recipe import AdapterConfig, Family


def trained_parameters(model: nn.Module, family: Family, adapter: AdapterConfig) -> dict[str, int]:
    """Count the parameters that an adapter trains, by component, with the always-trained ones.

    Works on the meta device. Raises UserError and ValueError as `placement.resolve`.
    """
    placement = resolve(model, family, adapter)
    query_tokens: Any = model.query_tokens
    counts = {component_of(QUERY_TOKENS): query_tokens.numel()}

    def add(name: str, number: int) -> None:
        component = component_of(name)
        counts[component] = counts.get(component, 0) + number

    for name in placement.full:
        add(name, sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False)))
    if adapter.method in PEFT:
        layers = PeftLayers(model, adapter, placement.lora)
        layers.remove()
        for name, parameter in layers.parameters.items():
            add(name, parameter.numel())
        return counts
    for name in placement.lora:
        linear: Any = model.get_submodule(name)
        singular_values = int(adapter.method == "adalora")  # per rank
        add(name, adapter.start_rank * (linear.in_features + linear.out_features + singular_values))
    return counts


def added_parameters(model: nn.Module, family: Family, adapter: AdapterConfig) -> int:
    """Count the trained parameters that the model does not have without the adapter."""
    qformer = adapter.qformer if adapter.qformer == "full" else ()
    without_lora = adapter.model_copy(update={"method": "lora", "llm": (), "llm_layers": None, "qformer": qformer})
    trained, own = (trained_parameters(model, family, config) for config in (adapter, without_lora))
    return sum(trained.values()) - sum(own.values())


def all_parameters(model: nn.Module) -> dict[str, int]:
    """Count all parameters of the model, by component."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        component = component_of(name)
        counts[component] = counts.get(component, 0) + parameter.numel()
    return counts
