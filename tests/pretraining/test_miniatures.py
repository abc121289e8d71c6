"""The pre-training recipe at toy scale: it learns, continues where it stopped, and records what made the weights."""

import json
import random
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.model import tiny
from blipfit.pretraining import answers as pretrain_answers
from blipfit.pretraining import miniatures as pretrain
from blipfit.pretraining import queries as pretrain_queries
from blipfit.pretraining import tasks as pretrain_tasks
from blipfit.pretraining import texts as pretrain_texts
from blipfit.pretraining import tower as pretrain_tower
from blipfit.pretraining.loop import Schedule
from blipfit.pretraining.tasks import Mixture

TOY = replace(
    pretrain.RECIPE,
    token_scenes=60,
    tower=Schedule(steps=8, batch=6, lr=1e-3, warmup=2),
    queries=Schedule(steps=8, batch=4, lr=1e-3, warmup=2),
    words=Schedule(steps=5, batch=8, lr=1e-3, warmup=2),
    relating=Schedule(steps=4, batch=4, lr=1e-3, warmup=2),
    answers=Schedule(steps=5, batch=4, lr=1e-3, warmup=2),
    last=Schedule(steps=4, batch=4, lr=1e-3, warmup=2),
    reading=Schedule(steps=4, batch=4, lr=1e-3, warmup=2),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with toy tokenizers, a toy tower, a toy Q-Former and language models; the state files by family."""
    target = tmp_path_factory.mktemp("miniatures")
    pretrain.train_tokenizers(TOY, target)
    tower, queries = target / "state/tower.safetensors", target / "state/queries.safetensors"
    pretrain.train_tower(TOY, target, tower, silent)
    pretrain.train_queries(TOY, target, tower, queries, silent)
    states = {}
    for family in ("t5", "vicuna"):
        words = target / f"state/{family}-words.safetensors"
        pretrain.train_words(TOY, family, target, words, silent)
        states[family] = pretrain.Before(tower, queries, words)
    return target, states


def silent(record):
    pass


def loss_of(target, before, recipe, family):
    """The loss of some fresh pictures with the parts of these states, before they are trained together."""
    backbone = pretrain.untrained(family, target, before.tower, before.queries, before.words, seed=recipe.seed)
    trained = pretrain_answers.Trained(backbone)
    with torch.no_grad():
        return sum(pretrain_answers.losses(backbone, trained, 1, 0, 8, Mixture()).values())


def test_the_tower_learns_and_the_clip_is_written(made):
    target, states = made
    tower = states["t5"].tower
    clip = tiny.build_clip(pretrain.CLIPProcessor.from_pretrained(target / tiny.CLIP_NAME).tokenizer)
    tokenizer = pretrain.CLIPProcessor.from_pretrained(target / tiny.CLIP_NAME).tokenizer
    scenes = [icons.scene(5, index) for index in range(6)]
    batch = pretrain_tower.batch(scenes, tokenizer, 1, 0)
    fresh = pretrain_tower.Tower(clip)
    trained = pretrain_tower.Tower(clip)
    weights = load_file(tower)
    trained.load_state_dict(
        {name.removeprefix("weight."): value for name, value in weights.items() if name.startswith("weight.")}
    )
    with torch.no_grad():
        before, after = fresh.losses(*batch), trained.losses(*batch)
    assert after["icon"] < before["icon"]
    assert after["board"] < before["board"]
    config = json.loads((target / tiny.CLIP_NAME / "config.json").read_text(encoding="utf-8"))
    assert config["blipfit"]["recipe"] == TOY.hash()


def test_the_qformer_learns_to_look(made):
    target, states = made
    tower, queries = states["t5"].tower, states["t5"].queries
    scenes = [icons.scene(6, index) for index in range(12)]
    found = []
    for parts in ((tower,), (tower, queries)):
        backbone = pretrain.untrained("t5", target, *parts, seed=TOY.seed)
        heads = pretrain_queries.Queries(backbone.hf)
        if len(parts) == 2:
            weights = load_file(queries)
            heads.load_state_dict({name.removeprefix("weight."): weights[name] for name in weights if name[0] == "w"})
        text = backbone.text.qformer(["Question: How many shapes are there? Short answer:"] * 12, return_tensors="pt")
        with torch.no_grad():
            features = backbone.see(pretrain_tower.pixels(scenes))
            seen, _ = heads(features, text["input_ids"], text["attention_mask"])
            found.append(pretrain_queries.cells_loss(heads, seen, pretrain_queries.cells(scenes)))
    assert found[1] < found[0]


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_answers_are_learned(made, family):
    target, states = made
    recipe = replace(TOY, answers=Schedule(steps=14, batch=6, lr=2e-3, warmup=2), together=Mixture())
    records = []
    pretrain.train_answers(
        recipe, family, target, states[family], target / f"learn/{family}.safetensors", records.append, checked=0
    )
    last = sum(records[-1][name] for name in ("answers", "captions", "heads"))
    assert last < 0.9 * float(loss_of(target, states[family], recipe, family))


@pytest.mark.parametrize("family", ["t5", "vicuna"])
def test_letters_are_learned_from_text(made, family):
    target, states = made
    losses = []
    for words in (None, states[family].words):
        backbone = pretrain.untrained(family, target, words=words, seed=TOY.seed)
        with torch.no_grad():
            losses.append(pretrain_answers.lookup_loss(backbone, 16, random.Random(1)))
    assert losses[1] < 0.95 * losses[0]


def test_t5_begins_by_looking_at_its_neighbours(made):
    backbone = pretrain.untrained("t5", made[0], seed=TOY.seed)
    attention = backbone.language.encoder.block[0].layer[0].SelfAttention
    bias = attention.compute_bias(6, 6, torch.device("cpu"))[0]
    assert all(bias[0, at].argmax() == at - 1 for at in range(1, 6))
    assert all(bias[1, at].argmax() == at + 1 for at in range(5))


def test_interrupted_equals_straight(made):
    target, states = made
    straight, stopped = target / "straight.safetensors", target / "stopped.safetensors"
    pretrain.train_answers(TOY, "t5", target, states["t5"], straight, silent, checked=0)
    pretrain.train_answers(TOY, "t5", target, states["t5"], stopped, silent, until=3, checked=0)
    pretrain.train_answers(TOY, "t5", target, states["t5"], stopped, silent, checked=0)
    one, other = (load_file(path.with_stem(f"{path.stem}-reading")) for path in (straight, stopped))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_everything_in_one_call_and_again_nothing(tmp_path):
    told = []
    arguments = {"families": ("t5",), "questions": 38, "pictures": 2, "checked": 0}
    measured = pretrain.pretrain_tiny(tmp_path, TOY, listen=told.append, **arguments)
    stages = list(dict.fromkeys(record["stage"] for record in told))
    assert stages == ["tower", "queries", "relating", "t5 words", "t5"]
    assert measured == {"t5": json.loads((tmp_path / "t5.json").read_text(encoding="utf-8"))}
    assert measured["t5"]["questions"] == 38
    assert set(measured["t5"]["by_skill"]) == set(icons.PRETRAINED)
    weights = load_file(tmp_path / "tiny-t5" / "model.safetensors")
    told.clear()
    assert pretrain.pretrain_tiny(tmp_path, TOY, listen=told.append, **arguments) == measured
    assert told == []
    again = load_file(tmp_path / "tiny-t5" / "model.safetensors")
    assert again.keys() == weights.keys()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_the_tower_stays_frozen(made):
    target, states = made
    tower = states["t5"].tower
    weights = load_file(tower)
    backbone = pretrain.untrained("t5", target, tower, states["t5"].queries, seed=0)
    trained = dict(pretrain_answers.Trained(backbone).named_parameters())
    ours = backbone.hf.vision_model.encoder.layers[0].mlp.fc1.weight
    assert not any(value is ours for value in trained.values())
    assert not ours.requires_grad
    assert torch.equal(ours, weights["weight.vision.encoder.layers.0.mlp.fc1.weight"])


def test_state_of_another_recipe_is_refused(tmp_path):
    pretrain._claim(tmp_path, TOY)
    pretrain._claim(tmp_path, TOY)
    with pytest.raises(UserError, match="another pre-training recipe"):
        pretrain._claim(tmp_path, pretrain.RECIPE)


def test_hash_follows_the_recipe():
    assert pretrain.PretrainRecipe().hash() == pretrain.RECIPE.hash()
    assert replace(TOY, looking=Mixture(asks=2)).hash() != TOY.hash()


def test_no_held_out_skill_is_ever_asked():
    held_out = {ask.question for index in range(400) for ask in icons.questions(icons.scene(7, index), icons.HELD_OUT)}
    rng = random.Random(0)
    for index in range(400):
        for made in pretrain_tasks.tasks(icons.scene(7, index), Mixture(), rng):
            assert not any(question in made.prompt for question in held_out)


def test_a_misread_question_keeps_its_options_and_its_answer():
    rng = random.Random(0)
    for index in range(200):
        for made in pretrain_tasks.tasks(icons.scene(7, index), Mixture(asks=9), rng):
            other = pretrain_tasks.misread(made, rng)
            assert (other.target, other.candidates) == (made.target, made.candidates)
            if "Question: " in made.prompt:
                assert other.prompt != made.prompt
                ends = [text[text.index("?") + 1 :] for text in (made.prompt, other.prompt)]
                assert ends[0] == ends[1]
                assert not pretrain_tasks.HELD_OUT_WORDS & set(other.prompt.replace("?", "").split())
            else:
                assert other == made


def test_free_channels_hold_no_embedding(made):
    weights = load_file(made[1]["t5"].tower)
    positions = weights["weight.vision.embeddings.position_embedding"][0]
    assert positions[:, : pretrain_tower.FREE].abs().max() == 0
    assert positions[:, pretrain_tower.FREE :].mean(1).abs().max() < 1e-6


def test_planted_errors_change_one_word():
    rng = random.Random(1)
    for index in range(100):
        text = pretrain_texts.fullest(icons.scene(8, index))
        wrong = pretrain_texts.planted(text, rng)
        differing = sum(a != b for a, b in zip(text.split(), wrong.split(), strict=True))
        assert differing == (0 if text in ("a clock", "a number line") else 1)


def test_truth_is_what_stands_there():
    scene = icons.Scene(0, 0, "scatter", "total", "white", (icons.Icon("heart", "blue", 1, 2, 2),))
    real = pretrain_tower.truth([scene])
    shape, color = icons.SHAPES.index("heart") + 1, icons.COLORS.index("blue") + 1
    patches = real["icon"].view(pretrain_tower.SIDE, pretrain_tower.SIDE, 3)
    assert patches[2:6, 4:8].reshape(-1, 3).unique(dim=0).tolist() == [[shape, color, 2]]
    assert patches[..., 0].count_nonzero() == 16
    assert real["board"][0, -1] == 1
    assert real["reading"][0] == -100
