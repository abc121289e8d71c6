"""Pre-training at toy scale: losses fall, an interrupted run continues, and checkpoints name their recipe."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPProcessor

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.model import tiny
from blipfit.pretraining import make_miniatures
from blipfit.pretraining.loop import StageSchedule
from blipfit.pretraining.pretrain_language_model import AnswerModules, compute_answer_losses, compute_lookup_loss
from blipfit.pretraining.pretrain_qformer import QFormerWithHeads, compute_cells_loss, read_cells
from blipfit.pretraining.pretrain_vision_tower import (
    FREE_CHANNELS,
    PATCHES_PER_SIDE,
    Tower,
    build_batch,
    build_targets,
    render_pixels,
)
from blipfit.pretraining.recipe import RECIPE, PretrainRecipe
from blipfit.pretraining.tasks import HELD_OUT_WORDS, Mixture, replace_question, sample_tasks
from blipfit.pretraining.texts import corrupt_text, select_detailed_caption

TOY = replace(
    RECIPE,
    tokenizer_scenes=60,
    tower=StageSchedule(steps=8, batch=6, lr=1e-3, warmup=2),
    queries=StageSchedule(steps=8, batch=4, lr=1e-3, warmup=2),
    words=StageSchedule(steps=5, batch=8, lr=1e-3, warmup=2),
    relating=StageSchedule(steps=4, batch=4, lr=1e-3, warmup=2),
    answers=StageSchedule(steps=5, batch=4, lr=1e-3, warmup=2),
    last=StageSchedule(steps=4, batch=4, lr=1e-3, warmup=2),
    reading=StageSchedule(steps=4, batch=4, lr=1e-3, warmup=2),
)


@pytest.fixture(scope="module")
def toy_stages(tmp_path_factory):
    """A folder with toy tokenizers, a toy tower, a toy Q-Former and language models; the state files by family."""
    folder = tmp_path_factory.mktemp("miniatures")
    make_miniatures.train_tokenizers(TOY, folder)
    tower, queries = folder / "state/tower.safetensors", folder / "state/queries.safetensors"
    make_miniatures.train_tower(TOY, folder, tower, ignore)
    make_miniatures.train_queries(TOY, folder, tower, queries, ignore)
    states = {}
    for family in ("t5", "vicuna"):
        words = folder / f"state/{family}-words.safetensors"
        make_miniatures.train_words(TOY, family, folder, words, ignore)
        states[family] = make_miniatures.StateFiles(tower, queries, words)
    return folder, states


def ignore(record):
    pass


def load_module_weights(state_file):
    """The weights of a state file under the names of the module, without the optimizer's moments."""
    weights = load_file(state_file)
    return {name.removeprefix("weight."): value for name, value in weights.items() if name.startswith("weight.")}


def initial_loss(folder, state, recipe, family):
    """The loss on some new pictures with the weights of these state files, before the answers' stage."""
    backbone = make_miniatures.build_backbone(family, folder, state.tower, state.queries, state.words, seed=recipe.seed)
    modules = AnswerModules(backbone)
    with torch.no_grad():
        return sum(compute_answer_losses(backbone, modules, 1, 0, 8, Mixture()).values())


def test_tower_learns_and_clip_is_written(toy_stages):
    folder, states = toy_stages
    tokenizer = CLIPProcessor.from_pretrained(folder / tiny.CLIP_NAME).tokenizer
    clip = tiny.build_clip(tokenizer)
    scenes = [icons.make_scene(5, index) for index in range(6)]
    batch = build_batch(scenes, tokenizer, 1, 0)
    untrained, trained = Tower(clip), Tower(clip)
    trained.load_state_dict(load_module_weights(states["t5"].tower))
    with torch.no_grad():
        before, after = untrained.compute_losses(*batch), trained.compute_losses(*batch)
    assert after["icon"] < before["icon"]
    assert after["board"] < before["board"]
    config = json.loads((folder / tiny.CLIP_NAME / "config.json").read_text(encoding="utf-8"))
    assert config["blipfit"]["recipe"] == TOY.hash()


def test_qformer_learns_what_is_in_the_cells(toy_stages):
    folder, states = toy_stages
    tower, queries = states["t5"].tower, states["t5"].queries
    scenes = [icons.make_scene(6, index) for index in range(12)]
    losses = []
    for files in ((tower,), (tower, queries)):
        backbone = make_miniatures.build_backbone("t5", folder, *files, seed=TOY.seed)
        module = QFormerWithHeads(backbone.hf)
        if len(files) == 2:
            module.load_state_dict(load_module_weights(queries))
        text = backbone.text.qformer_tokenizer(
            ["Question: How many shapes are there? Short answer:"] * 12, return_tensors="pt"
        )
        with torch.no_grad():
            features = backbone.see(render_pixels(scenes))
            outputs, _ = module(features, text["input_ids"], text["attention_mask"])
            losses.append(compute_cells_loss(module, outputs, read_cells(scenes)))
    assert losses[1] < losses[0]


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_answers_are_learned(toy_stages, family):
    folder, states = toy_stages
    recipe = replace(TOY, answers=StageSchedule(steps=14, batch=6, lr=2e-3, warmup=2), answers_mixture=Mixture())
    records = []
    state_file = folder / f"learn/{family}.safetensors"
    make_miniatures.train_answers(recipe, family, folder, states[family], state_file, records.append, curve_questions=0)
    last = sum(records[-1][name] for name in ("answers", "captions", "heads"))
    assert last < 0.9 * float(initial_loss(folder, states[family], recipe, family))


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_letters_are_learned_from_text(toy_stages, family):
    folder, states = toy_stages
    losses = []
    for words in (None, states[family].words):
        backbone = make_miniatures.build_backbone(family, folder, words=words, seed=TOY.seed)
        with torch.no_grad():
            losses.append(compute_lookup_loss(backbone, 16, random.Random(1)))
    assert losses[1] < 0.95 * losses[0]


def test_two_heads_of_t5_start_by_attending_to_the_neighbors(toy_stages):
    backbone = make_miniatures.build_backbone("t5", toy_stages[0], seed=TOY.seed)
    attention = backbone.language.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(6, 6, torch.device("cpu"))[0]
    assert all(bias[0, token].argmax() == token - 1 for token in range(1, 6))
    assert all(bias[1, token].argmax() == token + 1 for token in range(5))


def test_an_interrupted_run_gives_the_same_weights(toy_stages):
    folder, states = toy_stages
    straight, stopped = folder / "straight.safetensors", folder / "stopped.safetensors"
    make_miniatures.train_answers(TOY, "t5", folder, states["t5"], straight, ignore, curve_questions=0)
    make_miniatures.train_answers(TOY, "t5", folder, states["t5"], stopped, ignore, until=3, curve_questions=0)
    make_miniatures.train_answers(TOY, "t5", folder, states["t5"], stopped, ignore, curve_questions=0)
    expected, weights = (load_file(path.with_stem(f"{path.stem}-reading")) for path in (straight, stopped))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_a_second_call_trains_nothing_and_gives_the_same(tmp_path):
    records = []
    arguments = {"families": ("t5",), "questions": 38, "pictures": 2, "curve_questions": 0}
    results = make_miniatures.pretrain_tiny(tmp_path, TOY, listener=records.append, **arguments)
    stages = list(dict.fromkeys(record["stage"] for record in records))
    assert stages == ["tower", "queries", "relating", "t5 words", "t5"]
    assert results == {"t5": json.loads((tmp_path / "t5.json").read_text(encoding="utf-8"))}
    assert results["t5"]["questions"] == 38
    assert set(results["t5"]["by_skill"]) == set(icons.PRETRAINED)
    expected = load_file(tmp_path / "tiny-t5" / "model.safetensors")
    records.clear()
    assert make_miniatures.pretrain_tiny(tmp_path, TOY, listener=records.append, **arguments) == results
    assert records == []
    weights = load_file(tmp_path / "tiny-t5" / "model.safetensors")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_the_tower_stays_frozen(toy_stages):
    folder, states = toy_stages
    tower = states["t5"].tower
    backbone = make_miniatures.build_backbone("t5", folder, tower, states["t5"].queries, seed=0)
    trained = dict(AnswerModules(backbone).named_parameters())
    weight = backbone.hf.vision_model.encoder.layers[0].mlp.fc1.weight
    assert not any(value is weight for value in trained.values())
    assert not weight.requires_grad
    assert torch.equal(weight, load_module_weights(tower)["vision.encoder.layers.0.mlp.fc1.weight"])


def test_state_of_another_recipe_is_refused(tmp_path):
    make_miniatures._check_recipe(tmp_path, TOY)
    make_miniatures._check_recipe(tmp_path, TOY)
    with pytest.raises(UserError, match="another pre-training recipe"):
        make_miniatures._check_recipe(tmp_path, RECIPE)


def test_the_hash_depends_on_the_recipe_alone():
    assert PretrainRecipe().hash() == RECIPE.hash()
    assert replace(TOY, queries_mixture=Mixture(tasks_per_picture=2)).hash() != TOY.hash()


def test_the_hash_does_not_depend_on_the_names_of_fields():
    config = json.loads((tiny.clip_folder() / "config.json").read_text(encoding="utf-8"))
    assert RECIPE.hash() == config["blipfit"]["recipe"]


def test_no_task_asks_for_a_held_out_skill():
    scenes = [icons.make_scene(7, index) for index in range(400)]
    held_out = {question.question for scene in scenes for question in icons.make_questions(scene, icons.HELD_OUT)}
    rng = random.Random(0)
    for scene in scenes:
        for task in sample_tasks(scene, Mixture(), rng):
            assert not any(question in task.prompt for question in held_out)


def test_a_replaced_question_keeps_its_options_and_its_answer():
    rng = random.Random(0)
    for index in range(200):
        for task in sample_tasks(icons.make_scene(7, index), Mixture(tasks_per_picture=9), rng):
            replaced = replace_question(task, rng)
            assert (replaced.target, replaced.candidates) == (task.target, task.candidates)
            if "Question: " in task.prompt:
                assert replaced.prompt != task.prompt
                ends = [text[text.index("?") + 1 :] for text in (task.prompt, replaced.prompt)]
                assert ends[0] == ends[1]
                assert not HELD_OUT_WORDS & set(replaced.prompt.replace("?", "").split())
            else:
                assert replaced == task


def test_free_channels_have_no_embedding(toy_stages):
    weights = load_module_weights(toy_stages[1]["t5"].tower)
    positions = weights["vision.embeddings.position_embedding"][0]
    assert positions[:, :FREE_CHANNELS].abs().max() == 0
    assert positions[:, FREE_CHANNELS:].mean(1).abs().max() < 1e-6


def test_a_corrupted_text_differs_in_one_word():
    rng = random.Random(1)
    for index in range(100):
        text = select_detailed_caption(icons.make_scene(8, index))
        corrupted = corrupt_text(text, rng)
        differing = sum(a != b for a, b in zip(text.split(), corrupted.split(), strict=True))
        assert differing == (0 if text in ("a clock", "a number line") else 1)


def test_targets_describe_the_scene():
    scene = icons.Scene(0, 0, "scatter", "total", "white", (icons.Icon("heart", "blue", 1, 2, 2),))
    targets = build_targets([scene])
    shape, color = icons.SHAPES.index("heart") + 1, icons.COLORS.index("blue") + 1
    patches = targets["icon"].view(PATCHES_PER_SIDE, PATCHES_PER_SIDE, 3)
    assert patches[2:6, 4:8].reshape(-1, 3).unique(dim=0).tolist() == [[shape, color, 2]]
    assert patches[..., 0].count_nonzero() == 16
    assert targets["board"][0, -1] == 1
    assert targets["reading"][0] == -100
