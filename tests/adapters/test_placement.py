"""Placements name exactly the published layers; the real models' layers are counted on the meta device."""

import re

import pytest
import torch

from blipfit import grid
from blipfit.adapters import placement
from blipfit.errors import UserError
from blipfit.model import shapes
from blipfit.recipe import AdapterConfig

QFORMER_LAYERS, CROSS_LAYERS = 12, 6


def _real(family):
    return shapes.on_meta(grid.MODELS[family])


def _ends(names):
    """Layer numbers taken out: the kinds of layers there are."""
    return {re.sub(r"\.\d+\.", ".N.", name) for name in names}


@pytest.mark.parametrize(
    ("part", "kinds", "count"),
    [
        ("self_attn", {"attention.attention.query", "attention.attention.value"}, 2 * QFORMER_LAYERS),
        (
            "cross_attn",
            {
                "crossattention.attention.query",
                "crossattention.attention.key",
                "crossattention.attention.value",
                "crossattention.output.dense",
            },
            4 * CROSS_LAYERS,
        ),
        (
            "ffn",
            {"intermediate.dense", "output.dense", "intermediate_query.dense", "output_query.dense"},
            4 * QFORMER_LAYERS,
        ),
    ],
)
def test_q_former_sublayers(part, kinds, count):
    placed = placement.resolve(_real("t5"), "t5", AdapterConfig(qformer=(part,)))
    assert _ends(placed.lora) == {f"qformer.encoder.layer.N.{kind}" for kind in kinds}
    assert len(placed.lora) == len(set(placed.lora)) == count
    assert not placed.qformer_full


@pytest.mark.parametrize(
    ("family", "part", "kinds", "count"),
    [
        (
            "t5",
            "attn",
            {
                "encoder.block.N.layer.N.SelfAttention.q",
                "encoder.block.N.layer.N.SelfAttention.v",
                "decoder.block.N.layer.N.SelfAttention.q",
                "decoder.block.N.layer.N.SelfAttention.v",
                "decoder.block.N.layer.N.EncDecAttention.q",
                "decoder.block.N.layer.N.EncDecAttention.v",
            },
            24 * 6,
        ),
        (
            "t5",
            "ffn",
            {
                f"{side}.block.N.layer.N.DenseReluDense.{w}"
                for side in ("encoder", "decoder")
                for w in ("wi_0", "wi_1", "wo")
            },
            24 * 6,
        ),
        ("vicuna", "attn", {"model.layers.N.self_attn.q_proj", "model.layers.N.self_attn.v_proj"}, 64),
        ("vicuna", "ffn", {f"model.layers.N.mlp.{w}_proj" for w in ("gate", "up", "down")}, 96),
    ],
)
def test_language_model_sublayers(family, part, kinds, count):
    placed = placement.resolve(_real(family), family, AdapterConfig(llm=(part,)))
    assert _ends(placed.lora) == {f"language_model.{kind}" for kind in kinds}
    assert len(placed.lora) == len(set(placed.lora)) == count


@pytest.mark.parametrize(
    ("family", "layers", "stacks"),
    [
        ("t5", (0, 23, 24, 47), {"encoder.block.0", "encoder.block.23", "decoder.block.0", "decoder.block.23"}),
        ("vicuna", (31, 2), {"model.layers.2", "model.layers.31"}),
    ],
)
def test_chosen_blocks(family, layers, stacks):
    model = _real(family)
    every = placement.resolve(model, family, AdapterConfig(qformer=("ffn",), llm=("attn", "ffn")))
    chosen = placement.resolve(model, family, AdapterConfig(qformer=("ffn",), llm=("attn", "ffn"), llm_layers=layers))
    ours = {f"language_model.{stack}." for stack in stacks}
    wanted = [n for n in every.lora if n.startswith((*ours, "qformer."))]
    assert sorted(chosen.lora) == sorted(wanted)
    assert {n for n in ours if any(name.startswith(n) for name in chosen.lora)} == ours
    assert len(chosen.lora) < len(every.lora)


@pytest.mark.parametrize(("family", "last"), [("t5", 47), ("vicuna", 31)])
def test_a_block_that_is_not_there_is_an_error(family, last):
    adapter = AdapterConfig(llm=("attn",), llm_layers=(0, last + 1))
    with pytest.raises(UserError, match=rf"llm_layers has {last + 1}, .* blocks 0 to {last} "):
        placement.resolve(_real(family), family, adapter)


def test_the_self_attentions_output_is_never_adapted():
    every = AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("attn", "ffn"))
    for family in ("t5", "vicuna"):
        names = placement.resolve(_real(family), family, every).lora
        assert not [n for n in names if re.search(r"\.attention\.output\.|\.(k|o|k_proj|o_proj)$|lm_head", n)]
        assert not [n for n in names if n.startswith(("vision_model", "language_projection"))]


def test_always_trained():
    placed = placement.resolve(_real("t5"), "t5", AdapterConfig())
    assert placed.lora == ()
    assert set(placed.full) == {"vision_model.post_layernorm", "language_projection"}


def test_a_full_q_former_is_all_of_it():
    model = _real("vicuna")
    placed = placement.resolve(model, "vicuna", AdapterConfig(qformer="full"))
    parameters = {
        f"{name}.{p}" for name in placed.full for p, _ in model.get_submodule(name).named_parameters(recurse=False)
    }
    wanted = {n for n, _ in model.named_parameters() if n.startswith("qformer.")}
    always = {"vision_model.post_layernorm", "language_projection"}
    assert parameters == wanted | {f"{name}.{p}" for name in always for p in ("weight", "bias")}
    assert placed.qformer_full


def test_a_name_that_matches_nothing_is_an_error():
    """A model without cross-attention, say: one missing sublayer is not hidden by the others that match."""
    model = torch.nn.Module()
    model.qformer = torch.nn.ModuleDict({"encoder": torch.nn.ModuleDict({"layer": torch.nn.ModuleList()})})
    layer = torch.nn.ModuleDict({"output": torch.nn.ModuleDict({"dense": torch.nn.Linear(2, 2)})})
    model.qformer["encoder"]["layer"].append(layer)
    assert placement.resolve(model, "t5", AdapterConfig(qformer=("ffn",))).lora == (
        "qformer.encoder.layer.0.output.dense",
    )
    with pytest.raises(ValueError, match="no layer of this model matches qformer cross_attn"):
        placement.resolve(model, "t5", AdapterConfig(qformer=("ffn", "cross_attn")))


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_every_parameter_belongs_to_a_row_of_the_cost_table(family):
    rows = {placement.component(name) for name, _ in _real(family).named_parameters()}
    assert rows == {
        "vision",
        "vision layer norm",
        "query tokens",
        "projection",
        "qformer self_attn",
        "qformer cross_attn",
        "qformer ffn",
        "qformer other",
        "llm attn",
        "llm ffn",
        "llm other",
    }


def test_layers_without_gradient_are_those_of_the_model(backbone):
    """The text branch of the Q-Former's last feed-forward, and nothing else, stays without a gradient."""
    import reference
    from blipfit.adapters.bank import Bank

    bank = Bank(backbone, [AdapterConfig(qformer="full")], [0])
    batch = backbone.text.targets(reference.ask(backbone))
    bank.backward(backbone.losses(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).sum())
    dead = placement.without_gradient(backbone.hf)
    still = {name for name in bank.names(0) if not bank.tensor(0, name, bank.grads).any()}
    assert still == {name for name in bank.names(0) if dead.match(name)}
    assert len(still) == 6  # two dense layers and a layer norm
