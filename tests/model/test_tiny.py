"""The shipped miniatures are small, real checkpoints, and their answers depend on the picture."""

import json
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import CLIPModel, CLIPProcessor, InstructBlipForConditionalGeneration, InstructBlipProcessor

from blipfit.data import icons
from blipfit.model import tiny, tiny_tokenizers
from blipfit.model.loading import load
from blipfit.pretraining.evaluation import evaluate_mme, evaluate_questions, sample_questions
from blipfit.pretraining.recipe import RECIPE
from blipfit.pretraining.texts import format_multiple_choice
from blipfit.recipe import ModelConfig

FAMILIES: tuple[tiny.Family, ...] = ("t5", "vicuna")
SENTENCE = "Context: {} Question: {Which café is 1/2° warmer?} Options: {(a) zebra\n(b) 3 × 4\n} Answer:"
MIB = 2**20

LOADS_PLAINLY = """
from transformers import InstructBlipForConditionalGeneration, InstructBlipProcessor
InstructBlipForConditionalGeneration.from_pretrained({0!r})
InstructBlipProcessor.from_pretrained({0!r})
"""


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def backbone(family):
    return load(ModelConfig(name=tiny.NAMES[family]))


@pytest.fixture(scope="module")
def processor(family):
    return InstructBlipProcessor.from_pretrained(tiny.folder(family))


def test_transformers_alone_loads_it_without_a_python_warning(family):
    code = LOADS_PLAINLY.format(str(tiny.folder(family)))
    process = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def test_sizes():
    sizes = [sum(file.stat().st_size for file in tiny.folder(f).rglob("*") if file.is_file()) for f in FAMILIES]
    assert sum(sizes) <= 16 * MIB
    assert sum(file.stat().st_size for file in tiny.clip_folder().rglob("*") if file.is_file()) <= 4 * MIB


def test_weights_load_as_float32_and_nothing_is_missing(family):
    folder = tiny.folder(family)
    model, info = InstructBlipForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    queries = model.query_tokens[0]
    assert torch.pdist(queries).min() > 1e-3  # all query tokens differ


def test_t5_has_its_own_head():
    language_model = load(ModelConfig(name="tiny-t5")).hf.language_model
    assert language_model.lm_head.weight.data_ptr() != language_model.shared.weight.data_ptr()
    assert not torch.equal(language_model.lm_head.weight, language_model.shared.weight)


def test_special_ids(family, processor):
    tokenizer = processor.tokenizer
    ids = tokenizer("red").input_ids
    if family == "t5":
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id, ids[-1]) == (0, 1, 1)
    else:
        assert tokenizer.bos_token == tokenizer.eos_token == "</s>"
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)
    question = processor.qformer_tokenizer("Red").input_ids
    assert processor.qformer_tokenizer.convert_ids_to_tokens(question) == ["[CLS]", "red", "[SEP]"]


def test_ids_fit_the_embeddings(backbone, processor):
    config = backbone.hf.config
    assert config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert len(processor.tokenizer) <= config.text_config.vocab_size
    assert len(processor.qformer_tokenizer) <= config.qformer_config.vocab_size


def test_any_english_text_is_tokenized_without_an_unknown_token(family, processor):
    ids = processor.tokenizer(SENTENCE, add_special_tokens=False).input_ids
    if family == "t5":
        assert processor.tokenizer.unk_token_id not in ids
        # T5 has no newline: all white space is one blank, as in the published tokenizer.
        assert processor.tokenizer.decode(ids) == " ".join(SENTENCE.split())
    else:
        assert processor.tokenizer.decode(ids) == SENTENCE
    assert processor.qformer_tokenizer.unk_token_id not in processor.qformer_tokenizer(SENTENCE).input_ids


def test_a_trained_tokenizer_never_joins_a_word_and_its_punctuation():
    texts = ["It is red. Is it red?"] * 50
    for tokenizer in (tiny_tokenizers.train_t5(texts, 400), tiny_tokenizers.train_llama(texts, 600)):
        assert not [piece for piece in tokenizer.get_vocab() if piece.endswith(("red.", "red?"))]


def test_placeholders_are_replaced_by_the_visual_tokens(family, processor):
    """With transformers alone: `<image>` placeholders from its processor, then its generate."""
    model = InstructBlipForConditionalGeneration.from_pretrained(tiny.folder(family)).eval()
    scene, ask = sample_questions(11, ["color"], 1)[0]
    prompt = format_multiple_choice(ask)
    inputs = processor(images=icons.draw(scene), text=prompt.prompt, return_tensors="pt")
    assert (inputs["input_ids"] == model.config.image_token_index).sum() == tiny.QUERY_TOKENS
    ids = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].replace("<image>", "")
    assert text.removeprefix(prompt.prompt).strip().endswith(prompt.target)


@pytest.mark.parametrize("generate", [False, True])
def test_it_answers_questions_of_its_training(backbone, generate):
    result = evaluate_questions(backbone, sample_questions(901, icons.PRETRAINED, 285), generate=generate)
    assert result.accuracy >= 0.85


def test_it_answers_mme_questions(backbone):
    scores = evaluate_mme(backbone, 902, 60)
    assert set(scores) == set(icons.SUBTASKS)
    assert all(score >= 140 for score in scores.values()), scores  # 100 is what guessing gives


def test_it_was_trained_with_the_recipe_of_the_repository(family):
    config = json.loads((tiny.folder(family) / "config.json").read_text(encoding="utf-8"))
    assert config["blipfit"]["recipe"] == RECIPE.hash()
    with safe_open(tiny.folder(family) / "model.safetensors", "pt") as file:
        assert file.metadata()["recipe"] == RECIPE.hash()


@pytest.mark.parametrize("picture", ["blank", "swapped"])
def test_without_the_right_picture_it_guesses(backbone, picture):
    result = evaluate_questions(backbone, sample_questions(903, icons.PRETRAINED, 285), picture=picture)
    assert abs(result.accuracy - result.chance) <= 0.09


def test_held_out_skills_are_near_chance(backbone):
    result = evaluate_questions(backbone, sample_questions(904, icons.HELD_OUT, 280))
    assert abs(result.accuracy - result.chance) <= 0.1


def test_clip_tells_a_true_caption_from_a_false_one():
    model = CLIPModel.from_pretrained(tiny.clip_folder()).eval()
    processor = CLIPProcessor.from_pretrained(tiny.clip_folder())
    right = []
    for index in range(120):
        scene = icons.make_scene(905, index)
        if preference := icons.make_preference(scene):
            inputs = processor(
                images=icons.draw(scene), text=[preference.good, preference.bad], return_tensors="pt", padding=True
            )
            with torch.no_grad():
                good, bad = model(**inputs).logits_per_image[0]
            right.append(bool(good > bad))
    assert sum(right) / len(right) >= 0.7


def test_clip_and_instructblip_have_the_same_tower(backbone):
    clip = CLIPModel.from_pretrained(tiny.clip_folder()).eval()
    processor = CLIPProcessor.from_pretrained(tiny.clip_folder())
    image = icons.draw(icons.make_scene(906, 0))
    pixels = processor(images=image, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = clip.vision_model(pixel_values=pixels).last_hidden_state
        features = backbone.see(pixels)
    norm = torch.nn.LayerNorm(features.shape[-1])
    assert torch.allclose(norm(expected), norm(features), atol=2e-2)


def test_any_picture_fits(processor):
    inputs = processor(images=Image.new("RGB", (200, 90)), text="a", return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, tiny.IMAGE_SIZE, tiny.IMAGE_SIZE)
