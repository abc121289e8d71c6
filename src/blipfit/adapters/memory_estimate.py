"""Estimate the memory that training takes on a GPU, without loading weights."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from blipfit.adapters.bank import TRAINING_MATRICES
from blipfit.adapters.parameter_counts import all_parameters

SAVED_PER_TOKEN = {"t5": 20, "llama": 18}
"""Number of 16-bit values per token and unit of width that a layer saves for the backward pass, by model type.

Measured on an H200 with banks of 1 to 16 experiments in bf16, with dropout (`python -m benchmarks.gpu`).
"""

BYTES_QUANTIZED = {"none": 2.0, "8bit": 1.0, "4bit": 0.5 + 4 / 64}
"""Bytes per weight of a quantized linear layer; in 4 bit with an fp32 scale for every 64 weights (NF4)."""


def estimate_memory(
    model: nn.Module,
    trained_by_component: Mapping[str, int],
    experiments: int,
    tokens: int,
    rows: int,
    checkpointing: Sequence[str] = (),
    quantization: str = "none",
) -> dict[str, float]:
    """Estimate the memory in bytes that training takes on a GPU with 16-bit or quantized frozen weights, by purpose.

    `trained_by_component`: `trained_parameters` of an experiment. `experiments`: number in the bank. `tokens`: text
    tokens of a question. `rows`: questions of a batch, for each experiment. `checkpointing`: stages (`query`, `answer`)
    with activation checkpointing. `quantization`: of the language model's linear layers, `none`, `8bit` or `4bit`.

    Returns "weights": 2 bytes per parameter of the ViT and the language model, 4 of the Q-Former, and
    `BYTES_QUANTIZED` of quantized layers; "trained": the bank's
    matrices at 4 bytes; "activations": what the layers of the Q-Former and the language model save for the backward
    pass. A checkpointed stage saves its layers' inputs alone, and what a single layer computes again with its
    gradients.
    """
    counts = all_parameters(model)
    fp32_count = sum(n for component, n in counts.items() if component.startswith(("qformer", "query", "projection")))
    config: Any = model.config
    text, qformer = config.text_config, config.qformer_config
    width = getattr(text, "d_model", None) or text.hidden_size
    layers = getattr(text, "num_layers", None) or text.num_hidden_layers
    length, saved = tokens + config.num_query_tokens, SAVED_PER_TOKEN[text.model_type]
    stages = {"query": (qformer.hidden_size, qformer.num_hidden_layers), "answer": (width, layers)}
    widths = sum(size * number * (1 if stage in checkpointing else saved) for stage, (size, number) in stages.items())
    recomputed = max((2 * saved * stages[stage][0] for stage in checkpointing), default=0)
    return {
        "weights": 4 * fp32_count + 2 * (sum(counts.values()) - fp32_count) - _saved_by(quantization, model),
        "trained": 4 * TRAINING_MATRICES * sum(trained_by_component.values()) * experiments,
        "activations": 2 * length * (widths + recomputed) * rows * experiments,
    }


def _saved_by(quantization: str, model: nn.Module) -> float:
    """Bytes by which quantization reduces the 16-bit weights: all linear layers of the language model but its head."""
    language: Any = model.language_model
    head = language.get_output_embeddings()
    linear = [module for module in language.modules() if isinstance(module, nn.Linear) and module is not head]
    saved: float = (2 - BYTES_QUANTIZED[quantization]) * sum(module.weight.numel() for module in linear)
    return saved
