"""The memory estimate against peaks measured on a GPU."""

import pytest

from blipfit.adapters import memory_estimate, parameter_counts
from blipfit.model import shapes
from blipfit.recipe import AdapterConfig


def test_memory_grows_with_the_experiments():
    model = shapes.on_meta("Salesforce/instructblip-flan-t5-xl")
    trained = parameter_counts.trained_parameters(model, "t5", AdapterConfig(qformer="full"))
    single, double = (memory_estimate.estimate_memory(model, trained, k, tokens=128, rows=16) for k in (1, 2))
    assert double["weights"] == single["weights"]
    assert double["trained"] == 2 * single["trained"] == 56 * 187_262_464
    assert double["activations"] == 2 * single["activations"]
    assert 2 * 4.0e9 < single["weights"] < 2 * 4.3e9 + 4e8  # 4.0 G parameters, most of them at two bytes


@pytest.mark.parametrize(
    ("name", "rows", "experiments", "checkpointing", "qformer", "measured"),
    [
        ("flan-t5-xl", 16, 1, (), ("self_attn",), 14.86e9),
        ("flan-t5-xl", 16, 4, (), ("self_attn",), 30.44e9),
        ("flan-t5-xl", 16, 16, (), ("self_attn",), 92.38e9),
        ("flan-t5-xl", 16, 16, ("query", "answer"), ("self_attn",), 18.89e9),
        ("flan-t5-xl", 16, 4, (), "full", 49.11e9),
        ("vicuna-7b", 8, 1, (), ("self_attn",), 22.10e9),
        ("vicuna-7b", 8, 8, (), ("self_attn",), 60.36e9),
        ("vicuna-7b", 8, 8, ("query", "answer"), ("self_attn",), 21.75e9),
        ("vicuna-7b", 8, 4, (), "full", 58.02e9),
    ],
)
def test_the_memory_estimate_is_near_the_measured_memory_of_a_gpu(
    name, rows, experiments, checkpointing, qformer, measured
):
    """Peaks of torch's allocator on an H200, 106 text tokens (benchmarks/results/2026-11-27-gpu-h200-*.json)."""
    model = shapes.on_meta(f"Salesforce/instructblip-{name}")
    family = "t5" if "t5" in name else "vicuna"
    trained = parameter_counts.trained_parameters(model, family, AdapterConfig(qformer=qformer, rank=8))
    estimate = memory_estimate.estimate_memory(model, trained, experiments, 106, rows, checkpointing)
    assert sum(estimate.values()) == pytest.approx(measured, rel=0.1)


def test_checkpointing_lowers_the_memory_of_activations():
    model = shapes.on_meta("Salesforce/instructblip-flan-t5-xl")
    trained = parameter_counts.trained_parameters(model, "t5", AdapterConfig(qformer=("ffn",)))
    sizes = [
        memory_estimate.estimate_memory(model, trained, 1, 128, 16, stages)["activations"]
        for stages in ((), ("query",), ("answer",), ("query", "answer"))
    ]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 6
