"""Placements name exactly the published layers; the published models' layers are counted on the meta device."""

import re

import pytest
import torch

from blipfit import grid
from blipfit.adapters import placement
from blipfit.errors import UserError
from blipfit.model import shapes
from blipfit.recipe import AdapterConfig

QFORMER_LAYERS, CROSS_LAYERS = 12, 6


def _published_model(family):
    return shapes.on_meta(grid.MODELS[family])


def _layer_kinds(names):
    """The names without layer numbers: the kinds of layers."""
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
    placed = placement.resolve(_published_model("t5"), "t5", AdapterConfig(qformer=(part,)))
    assert _layer_kinds(placed.lora) == {f"qformer.encoder.layer.N.{kind}" for kind in kinds}
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
    placed = placement.resolve(_published_model(family), family, AdapterConfig(llm=(part,)))
    assert _layer_kinds(placed.lora) == {f"language_model.{kind}" for kind in kinds}
    assert len(placed.lora) == len(set(placed.lora)) == count


@pytest.mark.parametrize(
    ("family", "layers", "stacks"),
    [
        ("t5", (0, 23, 24, 47), {"encoder.block.0", "encoder.block.23", "decoder.block.0", "decoder.block.23"}),
        ("vicuna", (31, 2), {"model.layers.2", "model.layers.31"}),
    ],
)
def test_selected_blocks(family, layers, stacks):
    model = _published_model(family)
    all_blocks = placement.resolve(model, family, AdapterConfig(qformer=("ffn",), llm=("attn", "ffn")))
    selected = placement.resolve(model, family, AdapterConfig(qformer=("ffn",), llm=("attn", "ffn"), llm_layers=layers))
    prefixes = {f"language_model.{stack}." for stack in stacks}
    expected = [name for name in all_blocks.lora if name.startswith((*prefixes, "qformer."))]
    assert sorted(selected.lora) == sorted(expected)
    assert {p for p in prefixes if any(name.startswith(p) for name in selected.lora)} == prefixes
    assert len(selected.lora) < len(all_blocks.lora)


@pytest.mark.parametrize(("family", "last"), [("t5", 47), ("vicuna", 31)])
def test_a_block_that_does_not_exist_is_refused(family, last):
    adapter = AdapterConfig(llm=("attn",), llm_layers=(0, last + 1))
    with pytest.raises(UserError, match=rf"llm_layers has {last + 1}, .* blocks 0 to {last} "):
        placement.resolve(_published_model(family), family, adapter)


def test_the_output_layer_of_self_attention_is_not_adapted():
    every = AdapterConfig(qformer=("self_attn", "cross_attn", "ffn"), llm=("attn", "ffn"))
    for family in ("t5", "vicuna"):
        names = placement.resolve(_published_model(family), family, every).lora
        assert not [n for n in names if re.search(r"\.attention\.output\.|\.(k|o|k_proj|o_proj)$|lm_head", n)]
        assert not [n for n in names if n.startswith(("vision_model", "language_projection"))]


def test_always_trained_modules():
    placed = placement.resolve(_published_model("t5"), "t5", AdapterConfig())
    assert placed.lora == ()
    assert set(placed.full) == {"vision_model.post_layernorm", "language_projection"}


def test_a_full_q_former_is_trained_completely():
    model = _published_model("vicuna")
    placed = placement.resolve(model, "vicuna", AdapterConfig(qformer="full"))
    parameters = {
        f"{name}.{p}" for name in placed.full for p, _ in model.get_submodule(name).named_parameters(recurse=False)
    }
    qformer_parameters = {n for n, _ in model.named_parameters() if n.startswith("qformer.")}
    always_trained = {"vision_model.post_layernorm", "language_projection"}
    assert parameters == qformer_parameters | {f"{name}.{p}" for name in always_trained for p in ("weight", "bias")}
    assert placed.qformer_full


def test_a_sublayer_that_matches_no_layer_is_an_error():
    """For example a model without cross-attention, also where another sublayer matches."""
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
def test_every_parameter_belongs_to_a_component(family):
    components = {placement.component_of(name) for name, _ in _published_model(family).named_parameters()}
    assert components == {
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


def test_the_pattern_matches_exactly_the_layers_without_gradient(backbone):
    """Only the text branch of the Q-Former's last feed-forward has no gradient."""
    import reference
    from blipfit.adapters.bank import Bank

    bank = Bank(backbone, [AdapterConfig(qformer="full")], [0])
    batch = backbone.text.targets(reference.ask(backbone))
    bank.backward(backbone.losses(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).sum())
    pattern = placement.no_gradient_pattern(backbone.hf)
    names = {name for name in bank.tensor_names(0) if not bank.tensor(0, name, bank.grads).any()}
    assert names == {name for name in bank.tensor_names(0) if pattern.match(name)}
    assert len(names) == 6  # two dense layers and a layer norm
