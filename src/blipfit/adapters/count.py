"""How many parameters an experiment trains, counted on the modules that a placement names."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from blipfit.adapters import placement as places
from blipfit.adapters.bank import MATRICES
from blipfit.adapters.peft_methods import PeftLayers
from blipfit.methods import PEFT
from blipfit.recipe import AdapterConfig, Family


def trained(model: nn.Module, family: Family, adapter: AdapterConfig) -> dict[str, int]:
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


HALVES_KEPT = {"t5": 20, "llama": 18}
"""16-bit numbers that backward keeps for each token and unit of width in a layer, by the language model's type.

Measured on an H200 with banks of 1 to 16 experiments in bf16, with dropout (`python -m benchmarks.gpu`)."""


def memory_estimate(
    model: nn.Module,
    trained_by_part: Mapping[str, int],
    experiments: int,
    tokens: int,
    rows: int,
    checkpointing: Sequence[str] = (),
) -> dict[str, float]:
    """Bytes that training takes on a GPU with 16-bit frozen parts, by purpose: a sum, not a measurement.

    Weights: 2 bytes for ViT and language model, 4 for the Q-Former. Trained: the bank's matrices at 4 bytes.
    Activations: what backward keeps of Q-Former and language model for `rows` questions of `tokens` text tokens and
    each experiment; of a stage in `checkpointing` (`query`, `answer`) the layers' inputs, and of one layer what it
    computes again, with its gradients.
    """
    parts = total(model)
    fp32 = sum(n for part, n in parts.items() if part.startswith(("qformer", "query", "projection")))
    config: Any = model.config
    text, qformer = config.text_config, config.qformer_config
    width = getattr(text, "d_model", None) or text.hidden_size
    layers = getattr(text, "num_layers", None) or text.num_hidden_layers
    length, halves = tokens + config.num_query_tokens, HALVES_KEPT[text.model_type]
    stages = {"query": (qformer.hidden_size, qformer.num_hidden_layers), "answer": (width, layers)}
    widths = sum(size * count * (1 if stage in checkpointing else halves) for stage, (size, count) in stages.items())
    computed_again = max((2 * halves * stages[stage][0] for stage in checkpointing), default=0)
    return {
        "weights": 4 * fp32 + 2 * (sum(parts.values()) - fp32),
        "trained": 4 * MATRICES * sum(trained_by_part.values()) * experiments,
        "activations": 2 * length * (widths + computed_again) * rows * experiments,
    }
