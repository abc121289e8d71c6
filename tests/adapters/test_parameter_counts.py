"""Counted parameters are those that the bank allocates and those of the published models."""

import pytest

from blipfit.adapters import parameter_counts
from blipfit.adapters.bank import Bank
from blipfit.model import shapes
from blipfit.recipe import AdapterConfig


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterConfig(qformer=("self_attn", "ffn"), llm=("attn",), rank=3),
        AdapterConfig(qformer="full", llm=("attn", "ffn"), rank=2),
        AdapterConfig(),
    ],
)
def test_the_count_is_what_a_bank_trains(backbone, adapter):
    expected = parameter_counts.trained_parameters(backbone.hf, backbone.family, adapter)
    bank = Bank(backbone, [adapter], [0])
    assert bank.trained_parameters(0) == expected
    assert bank.values.numel() == sum(expected.values())


def test_every_parameter_is_counted_once(backbone):
    assert sum(parameter_counts.all_parameters(backbone.hf).values()) == sum(
        p.numel() for p in backbone.hf.parameters()
    )


def test_components_of_a_published_experiment():
    model = shapes.on_meta("Salesforce/instructblip-vicuna-7b")
    assert parameter_counts.trained_parameters(
        model, "vicuna", AdapterConfig(qformer=("cross_attn",), llm=("ffn",), rank=4)
    ) == {
        "query tokens": 32 * 768,
        "vision layer norm": 2 * 1408,
        "projection": 3_149_824,
        "qformer cross_attn": 4 * 44_544,
        "llm ffn": 4 * 1_449_984,
    }
