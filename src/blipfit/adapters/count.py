"""How many parameters an experiment trains, counted on the modules that a placement names."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from blipfit.adapters import placement as places
from blipfit.adapters.bank import MATRICES
from blipfit.adapters.peft_methods import PeftLayers
from blipfit.methods import PEFT
from blipfit.recipe import AdapterPart, Family


def trained(model: nn.Module, family: Family, adapter: AdapterPart) -> dict[str, int]:
    """Trained parameters by component, always-trained ones included; works on the meta device."""
    placed = places.resolve(model, family, adapter)
    query_tokens: Any = model.query_tokens
    counts = {places.component(places.QUERY_TOKENS): query_tokens.numel()}

    def add(name: str, number: int) -> None:
        counts[places.component(name)] = counts.get(places.component(name), 0) + number

    for name in placed.full:
        add(name, sum(p.numel() for p in model.get_submodule(name).parameters(recurse=False)))
    if adapter.method in PEFT:
        layers = PeftLayers(model, adapter, placed.lora)
        layers.remove()
        for name, parameter in layers.parameters.items():
            add(name, parameter.numel())
        return counts
    for name in placed.lora:
        linear: Any = model.get_submodule(name)
        values = int(adapter.method == "adalora")  # a singular value beside each pair of vectors
        add(name, adapter.start_rank * (linear.in_features + linear.out_features + values))
    return counts


def total(model: nn.Module) -> dict[str, int]:
    """All parameters of the model by component."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        part = places.component(name)
        counts[part] = counts.get(part, 0) + parameter.numel()
    return counts


def memory_estimate(
    model: nn.Module, trained_by_part: Mapping[str, int], experiments: int, tokens: int, rows: int
) -> dict[str, float]:
    """Bytes that training takes on a GPU with 16-bit frozen parts, by purpose: a sum, not a measurement.

    Weights: 2 bytes for ViT and language model, 4 for the Q-Former. Trained: the bank's
    matrices at 4 bytes. Activations: what backward keeps of the language model and the Q-Former, about 34 (T5's
    gated feed-forward included) hidden-width halves a token and layer.
    """
    parts = total(model)
    fp32 = sum(n for part, n in parts.items() if part.startswith(("qformer", "query", "projection")))
    config: Any = model.config
    text = config.text_config
    width = getattr(text, "d_model", None) or text.hidden_size
    layers = getattr(text, "num_layers", None) or text.num_hidden_layers
    qformer = config.qformer_config
    language_tokens = tokens + config.num_query_tokens
    kept = (
        34
        * 2
        * (
            language_tokens * width * layers
            + (128 + config.num_query_tokens) * qformer.hidden_size * qformer.num_hidden_layers
        )
    )
    return {
        "weights": 4 * fp32 + 2 * (sum(parts.values()) - fp32),
        "trained": 4 * MATRICES * sum(trained_by_part.values()) * experiments,
        "activations": kept * rows * experiments,
    }
