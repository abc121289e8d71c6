"""Generation gives a question the same text alone as in any batch, in both families, with every decoding preset."""

from dataclasses import replace

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor

import reference
from blipfit.adapters.bank import Bank
from blipfit.data.prompts import PromptedQuestion
from blipfit.errors import UserError
from blipfit.evaluation import generation
from blipfit.evaluation.generation import PRESETS, Decoding, get_preset
from blipfit.recipe import AdapterConfig


def _encode_mixed_prompts(backbone, count):
    """Prompts of seven very different lengths, so that every batch is padded."""
    return backbone.text.encode(
        [
            PromptedQuestion(f"Question: {'which of all the things ' * (n % 7)}is number {n}?", "x", ())
            for n in range(count)
        ]
    )


def _generate(backbone, encoded, pixels, decoding, batch_size):
    features = backbone.see(pixels)
    return generation.generate(backbone, encoded, lambda indices: features[list(indices)], decoding, batch_size)


@pytest.mark.parametrize("name", ["greedy", "published"])
def test_64_mixed_prompts_give_the_same_texts_alone_and_in_a_batch(backbone, name):
    """In double precision: the beams of a random model are so close that rounding in fp32 could change the best."""
    backbone.hf.double()
    decoding = replace(PRESETS[name], max_tokens=4, min_tokens=2)
    encoded, pixels = _encode_mixed_prompts(backbone, 64), reference.pictures(backbone, 64)
    (together,) = _generate(backbone, encoded, pixels, decoding, 64)
    (alone,) = _generate(backbone, encoded, pixels, decoding, 1)
    assert together == alone
    assert len(set(together)) > 40  # with equal answers the test could not fail


@pytest.mark.parametrize("name", ["short-answer", "caption", "sampling"])
def test_every_preset_gives_the_same_texts_in_batches_of_any_size(backbone, name):
    backbone.hf.double()
    decoding = replace(PRESETS[name], max_tokens=6)
    encoded, pixels = _encode_mixed_prompts(backbone, 7), reference.pictures(backbone, 7)
    (together,) = _generate(backbone, encoded, pixels, decoding, 12)
    assert (
        together
        == _generate(backbone, encoded, pixels, decoding, 5)[0]
        == _generate(backbone, encoded, pixels, decoding, 1)[0]
    )


def test_the_repetition_penalty_applies_to_every_new_token(backbone):
    """In a left-padded row the option of transformers ignores the first new tokens; this implementation does not."""
    decoding = Decoding(beams=1, max_tokens=12, min_tokens=12, repetition_penalty=1e6)
    encoded, pixels = _encode_mixed_prompts(backbone, 7), reference.pictures(backbone, 7)
    batch = backbone.text.prompts(encoded)
    ids = generation.generate_ids(backbone, backbone.query(backbone.see(pixels), batch), batch, decoding)
    for row in ids.tolist():
        assert len(set(row)) == len(row)
    unpenalized = generation.generate_ids(
        backbone, backbone.query(backbone.see(pixels), batch), batch, replace(decoding, repetition_penalty=1.0)
    )
    assert any(len(set(row)) < len(row) for row in unpenalized.tolist())


def test_generation_equals_hugging_faces_generate(backbone):
    """The answer, without the prompt, is the one that transformers' `generate` gives to the single question."""
    (encoded,), pixels = _encode_mixed_prompts(backbone, 1), reference.pictures(backbone, 1)
    ((text,),) = _generate(backbone, [encoded], pixels, Decoding(beams=3, max_tokens=6, repetition_penalty=1.5), 1)
    hf = backbone.hf
    expected = hf.generate(
        pixel_values=pixels,
        qformer_input_ids=torch.tensor([encoded.qformer]),
        qformer_attention_mask=torch.ones(1, len(encoded.qformer), dtype=torch.long),
        input_ids=torch.tensor([[hf.config.image_token_id] * hf.config.num_query_tokens + encoded.evaluation_prompt]),
        num_beams=3,
        max_new_tokens=6,
        min_new_tokens=1,
        do_sample=False,
        logits_processor=[RepetitionPenaltyLogitsProcessor(1.5)],
    )
    assert text == backbone.text.llm_tokenizer.decode(expected[0][-6:], skip_special_tokens=True).strip()
    assert text


def test_every_experiment_of_a_bank_generates_with_its_own_adapter(backbone):
    encoded, pixels = _encode_mixed_prompts(backbone, 5), reference.pictures(backbone, 5)
    decoding = Decoding(beams=2, max_tokens=5, min_tokens=5)
    (base,) = _generate(backbone, encoded, pixels, decoding, 2)
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [0, 1])
    bank.tensor(1, "language_projection.bias").add_(
        torch.linspace(-3, 3, bank.tensor(1, "language_projection.bias").numel())
    )
    first, second = _generate(backbone, encoded, pixels, decoding, 2)
    assert first == base
    assert second != base


def test_sampling_depends_on_the_seed_only(backbone):
    encoded, pixels = _encode_mixed_prompts(backbone, 6), reference.pictures(backbone, 6)
    samples = [
        _generate(backbone, encoded, pixels, replace(PRESETS["sampling"], max_tokens=6, seed=seed), 6)[0]
        for seed in (0, 0, 1)
    ]
    assert samples[0] == samples[1] != samples[2]
    assert samples[0] != _generate(backbone, encoded, pixels, replace(PRESETS["greedy"], max_tokens=6), 6)[0]


def test_sampling_follows_the_softmax():
    scores = torch.tensor([[0.5, 0.3, 0.2, 0.0]]).log()
    sampling = generation.GumbelSampling([7])
    counts = torch.zeros(4)
    for _ in range(4000):
        counts[sampling(None, scores).argmax()] += 1  # type: ignore[arg-type]
    torch.testing.assert_close(counts / 4000, torch.tensor([0.5, 0.3, 0.2, 0.0]), atol=0.03, rtol=0)


def test_ids_outside_the_vocabulary_are_skipped_in_decoding(backbone):
    ids = torch.tensor([backbone.text.llm_tokenizer("a red star", add_special_tokens=False).input_ids])
    special = torch.tensor(
        [[-100, -1, len(backbone.text.llm_tokenizer), 10**6, backbone.text.llm_tokenizer.eos_token_id]]
    )
    assert backbone.text.decode(torch.cat([special[:, :3], ids, special[:, 3:]], dim=1)) == ["a red star"]
    assert backbone.text.decode(special) == [""]


def test_the_published_settings():
    published = PRESETS["published"]
    assert (published.beams, published.max_tokens, published.min_tokens) == (5, 256, 1)
    assert (published.top_p, published.repetition_penalty, published.length_penalty) == (0.9, 1.5, 1.0)
    assert (published.temperature, published.sample) == (1.0, False)
    short = PRESETS["short-answer"]
    assert (short.beams, short.max_tokens, short.length_penalty) == (5, 10, -1.0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"beams": 0}, "needs at least 1 beam"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens ≤ max_tokens"),
        ({"top_p": 0.0}, "top_p"),
        ({"temperature": 0.0}, "temperature above 0"),
        ({"sample": True}, "one beam only"),
    ],
)
def test_decoding_refuses_values_out_of_range(values, message):
    with pytest.raises(UserError, match=message):
        Decoding(**values)


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'short-answer'"):
        get_preset("short-answers")
