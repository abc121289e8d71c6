"""The three stages compared with Hugging Face's own forward pass."""

import copy

import pytest
import torch
from transformers.models.instructblip.modeling_instructblip import InstructBlipVisionModel

import checkpoints
import reference
from blipfit.adapters.bank import Bank
from blipfit.model import loading
from blipfit.model.backbone import Backbone, fingerprint
from blipfit.recipe import AdapterConfig
from checkpoints import load


def _rows(encoded):
    return [(e.qformer, e.training_prompt, e.target) for e in encoded]


def test_stages_give_the_logits_of_hugging_face(backbone: Backbone):
    encoded, pixels = reference.ask(backbone), reference.pictures(backbone, 4)
    batch = backbone.text.targets(encoded)
    with torch.no_grad():
        visual = backbone.query(backbone.see(pixels), batch)
        staged = backbone.target_logits(visual, batch)
        losses = backbone.losses(visual, batch)
        loss, expected = reference.forward(backbone.hf, backbone, pixels, _rows(encoded))
    torch.testing.assert_close(staged[0], torch.cat(expected), atol=1e-5, rtol=0)
    assert staged.std() > 0.1  # logits without variance would pass any comparison
    assert losses.item() == pytest.approx(loss.item() * len(batch.labels_N), abs=1e-4)


def test_the_picture_and_the_instruction_matter(backbone: Backbone):
    encoded = reference.ask(backbone, 2)
    batch, other = backbone.text.targets(encoded), backbone.text.targets(encoded[::-1])
    features = backbone.see(reference.pictures(backbone, 2))
    visual = backbone.query(features, batch)
    assert (visual - backbone.query(features.flip(0), batch)).abs().max() > 1e-3
    assert (visual - backbone.query(features, other)).abs().max() > 1e-3
    assert (backbone.losses(visual, batch) - backbone.losses(visual.flip(0), batch)).abs() > 1e-4


def test_features_are_those_before_the_trained_layer_norm(backbone: Backbone):
    pixels = reference.pictures(backbone, 2)
    features = backbone.see(pixels)
    with torch.no_grad():
        expected = backbone.hf.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(backbone.hf.vision_model.post_layernorm(features), expected)
    assert (features - expected).abs().max() > 0.1
    assert not features.requires_grad


def test_losses_flow_back_to_the_query_stage_through_the_frozen_language_model(backbone: Backbone):
    bank = Bank(backbone, [AdapterConfig(qformer=("self_attn",), rank=2)], [0])
    batch = backbone.text.targets(reference.ask(backbone))
    bank.backward(backbone.losses(backbone.query(backbone.see(reference.pictures(backbone, 4)), batch), batch).sum())
    for name in bank.tensor_names(0):
        gradient = bank.tensor(0, name, bank.grads)
        assert bool(gradient.any()) != name.endswith("lora_A"), name  # B is zero, so A moves only from the second step


def test_t5_runs_the_exact_gelu(small):
    hf = load(small["t5"]).hf
    feed_forward = hf.language_model.encoder.block[0].layer[1].DenseReluDense
    x = torch.tensor([1.0])
    assert feed_forward.act(x).item() == pytest.approx(0.8413447, abs=1e-7)  # the tanh form gives 0.8411920


def _brute_force(hf, backbone, pixels, encoded):
    """Score every candidate alone in HF's forward pass: a batch of 1 without padding."""
    scores = []
    for row, e in enumerate(encoded):
        for candidate in e.candidates:
            _, logits = reference.forward(
                hf, backbone, pixels[row : row + 1], [(e.qformer, e.evaluation_prompt, candidate)]
            )
            scores.append(reference.log_likelihood(logits[0], candidate))
    return scores


def _scores(backbone, pixels, encoded):
    batch = backbone.text.candidates(encoded)
    return backbone.score_candidates(backbone.query(backbone.see(pixels), batch), batch)


@torch.no_grad()
def test_candidate_scores_equal_brute_force(backbone: Backbone):
    encoded, pixels = reference.ask(backbone, 5), reference.pictures(backbone, 5)
    scores = _scores(backbone, pixels, encoded)
    expected = _brute_force(backbone.hf, backbone, pixels, encoded)
    assert scores.sums_KM.tolist()[0] == pytest.approx(expected, abs=1e-4)
    assert scores.lengths_M.tolist() == [len(c) for e in encoded for c in e.candidates]
    assert max(expected) < 0


@torch.no_grad()
def test_candidate_scores_equal_brute_force_in_a_bank(backbone: Backbone):
    adapters = [
        AdapterConfig(qformer=("self_attn",), rank=1),
        AdapterConfig(llm=("attn", "ffn"), rank=4),
        AdapterConfig(qformer=("ffn", "cross_attn"), llm=("attn",), rank=2, alpha=3),
    ]
    encoded, pixels = reference.ask(backbone, 3), reference.pictures(backbone, 3)
    plain = copy.deepcopy(backbone.hf)
    bank = Bank(backbone, adapters, [0, 1, 2])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(1)), alpha=0.05)
    for k in range(3):  # the padding of the ranks stays zero, as training leaves it
        state = bank.state(k)
        bank.values[k] = 0
        bank.load_state(k, state)
    scores = _scores(backbone, pixels, encoded).sums_KM
    for k, adapter in enumerate(adapters):
        hf = reference.merged(copy.deepcopy(plain), adapter, bank.state(k))
        assert scores[k].tolist() == pytest.approx(_brute_force(hf, backbone, pixels, encoded), abs=1e-4)
    assert (scores[0] - scores[1]).abs().min() > 1e-4


@torch.no_grad()
def test_a_batch_has_the_scores_of_its_questions_alone(backbone: Backbone):
    encoded, pixels = reference.ask(backbone, 5), reference.pictures(backbone, 5)
    together = _scores(backbone, pixels, encoded).sums_KM[0]
    alone = [_scores(backbone, pixels[i : i + 1], encoded[i : i + 1]).sums_KM[0] for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-4, rtol=0)


def test_one_token_candidates_are_scored(backbone: Backbone):
    encoded, pixels = reference.ask(backbone, 2), reference.pictures(backbone, 2)
    for e in encoded:
        e.candidates[:] = [[5], [9]]
    with torch.no_grad():
        expected = _brute_force(backbone.hf, backbone, pixels, encoded)
        assert _scores(backbone, pixels, encoded).sums_KM[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_generation_in_a_batch_gives_the_same_as_alone(backbone: Backbone):
    encoded, pixels = reference.ask(backbone, 4), reference.pictures(backbone, 4)

    def generate(rows):
        batch = backbone.text.prompts([encoded[i] for i in rows])
        visual = backbone.query(backbone.see(pixels[rows]), batch)
        return backbone.generate(visual, batch, max_new_tokens=6, min_new_tokens=6, do_sample=False)

    together = generate([0, 1, 2, 3])
    assert torch.equal(together, torch.cat([generate([i]) for i in range(4)]))
    assert len({tuple(row) for row in together.tolist()}) > 1


def test_generation_gives_the_ids_of_hugging_face(backbone: Backbone):
    (e,), pixels = reference.ask(backbone, 1), reference.pictures(backbone, 1)
    batch = backbone.text.prompts([e])
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    ids = backbone.generate(backbone.query(backbone.see(pixels), batch), batch, **options)
    placeholder = [backbone.hf.config.image_token_id] * backbone.hf.config.num_query_tokens
    expected = backbone.hf.generate(
        pixel_values=pixels,
        qformer_input_ids=batch.qformer_ids_BT,
        input_ids=torch.tensor([placeholder + e.evaluation_prompt]),
        **options,
    )
    assert ids[0].tolist() == expected[0].tolist()[-ids.shape[1] :]


def test_equal_weights_have_equal_fingerprints():
    weights = torch.arange(6.0).view(2, 3)
    assert fingerprint(weights) == fingerprint(weights.clone())
    assert fingerprint(weights.t()) != fingerprint(weights)
    assert fingerprint(weights) != fingerprint(weights + 1e-7)


def relative_error(features, expected):
    return float((features.float() - expected).norm() / expected.norm())


def test_the_16_bit_tower_is_as_exact_as_the_originals(small):
    """A deep random tower with float16 in linear layers alone is near fp32 (0.08 %); cast as a whole it is not."""
    backbone = checkpoints.load(small["t5"])
    config = copy.deepcopy(backbone.hf.config.vision_config)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 39, 176, 768
    config._attn_implementation = "sdpa"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = InstructBlipVisionModel(config).eval().requires_grad_(False)
        for module in tower.modules():
            if isinstance(module, torch.nn.Linear):
                torch.nn.init.normal_(module.weight, std=module.in_features**-0.5)
        pixels = torch.randn(2, 3, config.image_size, config.image_size)
    backbone.hf.vision_model = tower
    expected = backbone.see(pixels)
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        whole = copy.deepcopy(tower).to(dtype)
        embedded = whole.embeddings(pixels.to(dtype))
        errors[dtype] = relative_error(whole.encoder(inputs_embeds=embedded).last_hidden_state, expected)
    loading.halve_tower(backbone.hf)
    features = backbone.see(pixels)
    assert features.dtype == torch.float32  # the residual stream
    error = relative_error(features, expected)
    assert 1e-4 < error < 1.2e-3
    assert error < errors[torch.float16]
    assert error < errors[torch.bfloat16] / 8


def test_fp32_features_are_those_of_the_plain_tower_bit_for_bit(backbone):
    pixels = reference.pictures(backbone, 3)
    vision = backbone.hf.vision_model
    with torch.no_grad():
        expected = vision.encoder(inputs_embeds=vision.embeddings(pixels)).last_hidden_state
    assert torch.equal(backbone.see(pixels), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(backbone.see(pixels), expected)


def test_the_q_former_is_evaluated_in_fp32(small, family):
    """Training runs under autocast; evaluation, without gradients, gives the visual tokens of fp32."""
    exact, low = (checkpoints.load(small[family], precision=precision) for precision in ("fp32", "bf16"))
    batch = exact.text.candidates(reference.ask(exact))
    features = exact.see(reference.pictures(exact, 4))
    with torch.no_grad():
        expected, visual = exact.query(features, batch), low.query(features, batch)
    assert visual.dtype == torch.float32
    torch.testing.assert_close(visual, expected, rtol=1e-6, atol=1e-6)
    assert low.query(features, batch).dtype == torch.bfloat16
