"""FLOPs by formula compared with torch's counter: every stage, both families, and a shape unlike the miniatures'."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration, LlamaConfig, T5Config

from blipfit.data.batches import CandidateBatch, PromptBatch, TargetBatch
from blipfit.model import cost, shapes
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.runtime import onednn

LENGTHS = Lengths(text=23, qformer=19, answer=5, candidates=3)

MIDDLE_VISION = {
    "hidden_size": 96,
    "intermediate_size": 352,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "image_size": 56,
    "patch_size": 14,
}
MIDDLE_QFORMER = {
    "vocab_size": 200,
    "hidden_size": 80,
    "intermediate_size": 200,
    "num_hidden_layers": 5,
    "num_attention_heads": 5,
    "cross_attention_frequency": 2,
    "encoder_hidden_size": 96,
}
MIDDLE_TEXT = {
    "t5": T5Config(
        vocab_size=320, d_model=64, d_kv=24, d_ff=144, num_layers=4, num_decoder_layers=2, num_heads=3,
        feed_forward_proj="gated-gelu", decoder_start_token_id=0,
    ),
    "vicuna": LlamaConfig(
        vocab_size=300, hidden_size=96, intermediate_size=208, num_hidden_layers=3, num_attention_heads=6,
        num_key_value_heads=2, pad_token_id=0,
    ),
}  # fmt: skip


class TextEncoderStub:
    """The attributes of a text encoder that the stages read."""

    decoder_start = 0
    llm_tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=0)


def middle_backbone(family: str) -> Backbone:
    config = InstructBlipConfig(
        vision_config=MIDDLE_VISION,
        qformer_config=MIDDLE_QFORMER,
        text_config=MIDDLE_TEXT[family],
        num_query_tokens=7,
        image_token_index=9,
    )
    hf = InstructBlipForConditionalGeneration(config).eval()
    return Backbone(hf, TextEncoderStub(), family, "middle")  # type: ignore[arg-type]


def use_eager_attention(backbone: Backbone) -> Backbone:
    """Switch to eager attention, because torch's counter has no formula for the fused attention of CPUs."""
    backbone.hf.set_attn_implementation("eager")
    return backbone


def batches(backbone: Backbone, lengths: Lengths) -> tuple[TargetBatch, CandidateBatch, PromptBatch]:
    def ids(rows: int, tokens: int) -> torch.Tensor:
        return torch.randint(10, 50, (rows, tokens))

    T, A, M = lengths.text, lengths.answer, lengths.candidates
    qformer, prompt = ids(1, lengths.qformer), ids(1, T)
    front = (qformer, torch.ones_like(qformer), prompt, torch.ones_like(prompt))
    if backbone.family == "t5":
        target = TargetBatch(*front, ids(1, A), torch.arange(A), ids(1, A)[0])
    else:
        text = ids(1, T + A)
        target = TargetBatch(*front[:2], text, torch.ones_like(text), None, torch.arange(T - 1, T + A - 1), text[0, T:])
    candidates = ids(M, A)
    ranked = CandidateBatch(*front, candidates, torch.ones_like(candidates), torch.zeros(M, dtype=torch.long))
    return target, ranked, PromptBatch(*front)


@torch.no_grad()
def count_flops(backbone: Backbone, lengths: Lengths) -> dict[str, int]:
    """Count the FLOPs of one question in every stage with torch."""
    target, ranked, prompt = batches(backbone, lengths)
    size, A = backbone.image_size, lengths.answer
    counts: dict[str, int] = {}

    onednn.onednn_is_faster()  # its trial products must not be counted

    def count(name, stage, *inputs, **options):
        with FlopCounterMode(display=False) as counter:
            output = stage(*inputs, **options)
        counts[name] = counter.get_total_flops()
        return output

    features = count("see", backbone.see, torch.randn(1, 3, size, size))
    visual = count("query", backbone.query, features, target)
    count("answer", backbone.target_logits, visual, target)
    count("rank", backbone.score_candidates, visual, ranked)
    count(
        "generate", backbone.generate, visual, prompt, min_new_tokens=A, max_new_tokens=A, do_sample=False, num_beams=1
    )
    return counts


@pytest.mark.parametrize("size", ["small", "middle"])
def test_formulas_agree_with_the_counter(family, size, backbone):
    backbone = middle_backbone(family) if size == "middle" else backbone
    counts, formula = count_flops(use_eager_attention(backbone), LENGTHS), cost.flops(backbone.hf.config, LENGTHS)
    assert counts.keys() == formula.keys()
    for stage, number in counts.items():
        assert formula[stage] == pytest.approx(number, rel=0.02), stage


# GFLOP of one forward of the published models: see, query, answer at (text, answer) tokens.
PUBLISHED = [
    ("Salesforce/instructblip-flan-t5-xl", 40, 8, 521, 20, 220),
    ("Salesforce/instructblip-flan-t5-xl", 128, 12, 521, 35, 475),
    ("Salesforce/instructblip-vicuna-7b", 40, 8, 521, 20, 1040),
    ("Salesforce/instructblip-vicuna-7b", 128, 12, 521, 35, 2239),
]


@pytest.mark.parametrize(("name", "text", "answer", "see", "query", "language"), PUBLISHED)
def test_published_models(name, text, answer, see, query, language):
    flops = cost.flops(shapes.on_meta(name).config, Lengths(text, text, answer))
    assert flops["see"] / 1e9 == pytest.approx(see, rel=0.01)
    # Rows of text tokens in the last layer are not computed.
    omitted = 2 * text * (2 * 768**2 + 2 * 768 * 3072) + 4 * text * (32 + text) * 768
    assert (flops["query"] + omitted) / 1e9 == pytest.approx(query, rel=0.03)
    assert flops["answer"] / 1e9 == pytest.approx(language, rel=0.01)


def test_parameters_of_the_published_model():
    counts = cost.parameters(shapes.on_meta("Salesforce/instructblip-flan-t5-xl"))
    assert counts == {
        "vision": 985_952_256 - 2 * 1408,
        "vision layer norm": 2 * 1408,
        "query_tokens": 32 * 768,
        "qformer": 185_660_160,
        "projection": 1_574_912,
        "language_model": 2_849_757_184,
    }


def test_bytes_depend_on_the_dtypes(backbone):
    assert cost.weight_bytes(backbone.hf) == {"float32": 4 * sum(p.numel() for p in backbone.hf.parameters())}
    backbone.hf.language_model.to(torch.bfloat16)
    language = sum(p.numel() for p in backbone.hf.language_model.parameters())
    assert cost.weight_bytes(backbone.hf)["bfloat16"] == 2 * language
    counts = cost.parameters(backbone.hf)
    frozen = counts["vision"] + counts["language_model"]
    assert cost.loaded_bytes(backbone.hf)["16-bit"] == 4 * sum(counts.values()) - 2 * frozen
