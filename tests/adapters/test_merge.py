"""Merging: the weights of a merged model compute what base model and adapter compute."""

import pytest
import torch
from transformers import AutoProcessor

import checkpoints
import reference
from blipfit.adapters import merge, peft_format
from blipfit.data.prompts import PromptedQuestion
from saved_adapters import ADAPTERS, save_trained


@torch.no_grad()
def _scores(backbone) -> torch.Tensor:
    batch = backbone.text.candidates(reference.ask(backbone))
    visual = backbone.query(backbone.see(reference.pictures(backbone, 4)), batch)
    return backbone.score_candidates(visual, batch).sums_KM[0]


@pytest.mark.parametrize(
    ("family", "name"), [*(("t5", name) for name in ADAPTERS), ("vicuna", "lora"), ("vicuna", "full Q-Former")]
)
def test_a_merged_model_computes_what_the_adapter_does(backbone, small, tmp_path, name):
    folder = save_trained(tmp_path / "adapter", small[backbone.family], ADAPTERS[name])
    base_scores, names = _scores(backbone), set(backbone.hf.state_dict())
    bank, _ = peft_format.install(backbone, folder)
    adapter_scores = _scores(backbone)
    bank.remove()
    merge.merge_adapter(backbone.hf, folder)
    torch.testing.assert_close(_scores(backbone), adapter_scores, atol=1e-4, rtol=0)
    assert (base_scores - adapter_scores).abs().max() > 0.05
    assert set(backbone.hf.state_dict()) == names
    assert not hasattr(backbone.hf, "peft_config")
    assert not any(parameter.requires_grad for parameter in backbone.hf.parameters())


def test_a_cast_model_keeps_the_trained_parts_in_fp32(backbone):
    merge.cast(backbone.hf, torch.bfloat16)
    dtypes = {name: tensor.dtype for name, tensor in backbone.hf.named_parameters()}
    assert {t for n, t in dtypes.items() if n.startswith("language_model.")} == {torch.bfloat16}
    trained = ("query_tokens", "qformer.", "language_projection.", "vision_model.post_layernorm.")
    assert {t for n, t in dtypes.items() if n.startswith(trained)} == {torch.float32}
    assert dtypes["vision_model.encoder.layers.0.mlp.fc1.weight"] == torch.float16


@pytest.mark.parametrize("family", ["vicuna"])
def test_the_processor_gives_the_ids_that_blipfit_reads(hub_like, family, tmp_path):
    """The hub's Vicuna copies do not say that a BOS token is added."""
    backbone = checkpoints.load(hub_like[family])
    merge.write_checkpoint(tmp_path / "merged", backbone, hub_like[family], torch.float32)
    text = "Question: of the  are? Short answer:"
    inputs = AutoProcessor.from_pretrained(tmp_path / "merged")(text=text)
    (encoded,) = backbone.text.encode([PromptedQuestion(text, "x", ())])
    assert (inputs["input_ids"], inputs["qformer_input_ids"]) == ([encoded.evaluation_prompt], [encoded.qformer])
