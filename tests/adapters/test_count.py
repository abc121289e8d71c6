"""Counts are of the modules: what the bank allocates, and what the published models have."""

import pytest

from blipfit.adapters import count
from blipfit.adapters.bank import Bank
from blipfit.model import shapes
from blipfit.recipe import AdapterPart


@pytest.mark.parametrize(
    "adapter",
    [
        AdapterPart(qformer=("self_attn", "ffn"), llm=("attn",), rank=3),
        AdapterPart(qformer="full", llm=("attn", "ffn"), rank=2),
        AdapterPart(),
    ],
)
def test_counted_is_what_a_bank_trains(backbone, adapter):
    expected = count.trained(backbone.hf, backbone.family, adapter)
    bank = Bank(backbone, [adapter], [0])
    assert bank.trained_parameters(0) == expected
    assert bank.values.numel() == sum(expected.values())


def test_total_counts_every_parameter_once(backbone):
    assert sum(count.total(backbone.hf).values()) == sum(p.numel() for p in backbone.hf.parameters())


def test_parts_of_a_published_experiment():
    model = shapes.on_meta("Salesforce/instructblip-vicuna-7b")
    assert count.trained(model, "vicuna", AdapterPart(qformer=("cross_attn",), llm=("ffn",), rank=4)) == {
        "query tokens": 32 * 768,
        "vision layer norm": 2 * 1408,
        "projection": 3_149_824,
        "qformer cross_attn": 4 * 44_544,
        "llm ffn": 4 * 1_449_984,
    }


def test_memory_grows_with_the_experiments():
    model = shapes.on_meta("Salesforce/instructblip-flan-t5-xl")
    trained = count.trained(model, "t5", AdapterPart(qformer="full"))
    one, two = (count.memory_estimate(model, trained, k, tokens=128, rows=16) for k in (1, 2))
    assert two["weights"] == one["weights"]
    assert two["trained"] == 2 * one["trained"] == 56 * 187_262_464
    assert two["activations"] == 2 * one["activations"]
    assert 2 * 4.0e9 < one["weights"] < 2 * 4.3e9 + 4e8  # 4.0 G parameters, most of them at two bytes
