"""The miniatures in use: on drawn pictures they are right, on photographs they run."""

import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import blipfit
from blipfit import grid
from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.data import icons
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.inference import Model, wordings
from blipfit.recipe import AdapterConfig
from blipfit.training import loop

PHOTOS = Path(__file__).parents[1].parent / "shared" / "data" / "photos"
FIND = 200


def _drawn(seed: int, count: int) -> list[icons.Scene]:
    """Scenes that no test or training of another kind draws."""
    return [icons.make_scene(seed, index) for index in range(count)]


@pytest.fixture(scope="module")
def board(tmp_path_factory) -> tuple[Path, list[icons.Scene]]:
    folder = tmp_path_factory.mktemp("board")
    scenes = _drawn(987_654, FIND)
    (folder / "below").mkdir()
    for number, scene in enumerate(scenes):
        icons.draw(scene).save(folder / ("below" if number % 2 else ".") / f"{number:03d}.png")
    (folder / "notes.txt").write_text("no picture")
    return folder, scenes


@pytest.fixture(scope="module", params=["tiny-t5", "tiny-vicuna"])
def model(request) -> Model:
    return blipfit.load(request.param)


def _shows(scene: icons.Scene, text: str) -> bool:
    color, shape = text.split()[-2:]
    return any((icon.color, icon.shape) == (color, shape) for icon in scene.icons)


@pytest.mark.parametrize("text", ["red star", "a yellow circle", "blue heart"])
def test_search_finds_what_is_there(model, board, text):
    folder, scenes = board
    found = model.search(folder, text, top=5)
    right = [_shows(scenes[int(one.image.stem)], text) for one in found]
    assert sum(_shows(scene, text) for scene in scenes) < FIND / 8  # so that chance finds one in eight at most
    assert sum(right) >= 4
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    assert found[0].score > 0  # likelier than on an even gray


def test_the_second_search_sees_no_picture_again(model, board, monkeypatch):
    folder, _ = board
    first = model.search(folder, "red star", top=FIND)
    seen = []
    see = model.backbone.see
    monkeypatch.setattr(model.backbone, "see", lambda pixels: seen.append(len(pixels)) or see(pixels))
    assert model.search(folder, "red star", top=FIND) == first
    assert seen == [1]  # the even gray
    assert len(first) == FIND
    again = model.search([first[3].image, first[0].image], "red star")
    assert [one.image for one in again] == [first[0].image, first[3].image]


SKILLS = ("color", "count_all", "exists", "time")


def test_it_answers(model):
    asked = [(scene, ask) for scene in _drawn(55, 30) for ask in icons.make_questions(scene, SKILLS)][:24]
    right = ranked = 0
    for scene, ask in asked:
        picture = icons.draw(scene)
        right += model.ask(picture, ask.question) == ask.answer
        ranked += model.rank(picture, ask.question, ask.choices, prompt="iconqa-v1")[0].choice == ask.answer
    assert min(right, ranked) >= 16, (right, ranked)


def test_it_describes(model):
    """Of the kinds of icons that captions name, most are in their pictures; by chance every tenth would be."""
    scenes = [scene for scene in _drawn(66, 30) if scene.icons][:12]
    pictures = [icons.draw(scene) for scene in scenes]
    told = model.captions(pictures)
    assert told[3] == model.caption(pictures[3])
    kind = re.compile(rf"({'|'.join(icons.COLORS)}) ({'|'.join(icons.SHAPES)})")
    named = [(scene, " ".join(found)) for scene, text in zip(scenes, told, strict=True) for found in kind.findall(text)]
    assert len(named) >= 8
    assert sum(_shows(scene, text) for scene, text in named) >= 0.6 * len(named)


def test_ranking_gives_shares_of_all_choices(model):
    picture = icons.draw(icons.make_scene(1, 2))
    ranked = model.rank(picture, "Which shape is red?", ["star", "circle", "moon"])
    assert math.fsum(one.probability for one in ranked) == pytest.approx(1)
    assert [one.log_likelihood for one in ranked] == sorted((r.log_likelihood for r in ranked), reverse=True)
    odds = math.exp(ranked[0].log_likelihood - ranked[1].log_likelihood)
    assert ranked[0].probability / ranked[1].probability == pytest.approx(odds)
    with pytest.raises(UserError, match="two choices"):
        model.rank(picture, "Which?", ["star"])


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="../shared/data/photos is not here")
def test_choices_that_cannot_be_lettered_or_read_are_refused(model):
    picture = Image.new("RGB", (64, 64), "red")
    with pytest.raises(UserError, match="27 choices: at most 26 can be lettered"):
        model.rank(picture, "Which?", [str(n) for n in range(27)])
    with pytest.raises(UserError, match=r"a prompt has [\d,]+ tokens, more than the limit of 2,048"):
        model.rank(picture, "Which?", ["x" * 100_000, "y"])
    with pytest.raises(UserError, match=r"a prompt has [\d,]+ tokens, more than the limit of 2,048"):
        model.ask(picture, "x" * 100_000)
    for prompt in ("instruction-v1", "caption-v1"):  # prompts without the choices
        with pytest.raises(UserError, match="a choice or text is longer than 256 tokens"):
            model.rank(picture, "Which?", ["x " * 50_000, "y"], prompt=prompt)


def test_scores_that_are_not_finite_are_an_error():
    model = blipfit.load("tiny-t5")
    model.backbone.hf.language_projection.bias.data.fill_(math.nan)
    with pytest.raises(UserError, match="the model's scores are NaN or infinite"):
        model.rank(Image.new("RGB", (64, 64), "red"), "Which?", ["a", "b"])


def test_photographs_do_no_harm(model):
    photos = sorted(PHOTOS.iterdir())
    assert all(model.captions(photos))
    assert isinstance(model.ask(photos[0], "What is in the picture?"), str)
    assert len(model.search(PHOTOS, "a yellow car", top=9)) == len(photos)


def test_wordings():
    assert wordings("red star") == ("red star", "a red star")
    assert wordings(" orange  star ") == ("orange star", "an orange star")
    for begun in ("a red star", "An owl", "two red stars", "3 stars", "the sea"):
        assert wordings(begun) == (begun,)
    with pytest.raises(UserError, match="what to search for"):
        wordings("  ")


def test_what_cannot_be_used(tmp_path):
    model = blipfit.load("tiny")
    assert model.backbone.name == "tiny-t5"
    with pytest.raises(UserError, match="holds no images"):
        model.search(tmp_path, "a red star")
    with pytest.raises(UserError, match="is no folder"):
        model.search(tmp_path / "none", "a red star")
    with pytest.raises(UserError, match="did you mean 'caption'"):
        model.caption(Image.new("RGB", (8, 8)), "captions")
    with pytest.raises(UserError, match="is missing"):
        model.ask(tmp_path / "none.png", "What is it?")
    with pytest.raises(UserError, match="not an adapter folder"):
        blipfit.load("tiny", tmp_path)


@pytest.fixture(scope="module")
def photo_files(tmp_path_factory) -> dict[str, Path]:
    """Images that a plain conversion shows wrongly: turned by EXIF data, 16 bits, transparent."""
    folder = tmp_path_factory.mktemp("photos")
    ramp = np.arange(64 * 48 * 3, dtype=np.uint32).reshape(48, 64, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray((ramp % 251).astype(np.uint8)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray((ramp[..., 0] * 7).astype(np.uint16)).save(folder / "deep.png")
    transparent = Image.new("RGBA", (64, 48), (0, 0, 0, 0))
    transparent.paste((0, 0, 0, 255), (20, 20, 40, 40))
    transparent.save(folder / "transparent.png")
    return {file.stem: file for file in folder.iterdir()}


@pytest.mark.parametrize("name", ["turned", "deep", "transparent"])
def test_an_image_in_memory_is_seen_as_its_file(photo_files, name):
    model = blipfit.load("tiny")
    file = photo_files[name]
    expected = model._see([file])
    sources = [str(file), file.read_bytes(), Image.open(file)]
    if name != "turned":
        sources.append(np.asarray(Image.open(file)))
    for source in sources:
        assert torch.equal(model._see([source]), expected)
    question = Question("", file, "", "")
    stored = model._stored_features().features([question])
    assert torch.equal(stored, expected.to(stored.dtype))
    if name == "transparent":
        dropped = replace(question, transparency="dropped")
        assert not torch.equal(model._stored_features().features([dropped]), stored)


def test_arguments_of_wrong_types(photo_files):
    model, file = blipfit.load("tiny"), photo_files["deep"]
    for choices in ("red", ["red", 3]):
        with pytest.raises(UserError, match="must be a"):
            model.rank(file, "Which?", choices)
    for image in (["a.png"], None, 3, np.zeros((2, 2, 5), np.uint8), np.zeros((2, 2)), np.zeros((0, 2), np.uint8)):
        with pytest.raises(UserError, match="image"):
            model.ask(image, "What?")
    for address in ("http://example.org/a.jpg", "data:image/png;base64,AAAA"):
        with pytest.raises(UserError, match=r"the image (is an address|holds an image)"):
            model.ask(address, "What?")
    for question in (None, "caf\udce9?"):
        with pytest.raises(UserError, match="the question"):
            model.ask(file, question)
    with pytest.raises(UserError, match="the text holds half a character"):
        model.search(file.parent, "caf\udce9")
    assert model.captions(path for path in [file]) == model.captions(file) == [model.caption(file)]


def test_a_search_in_a_list_warns_of_what_it_leaves_out(photo_files, tmp_path):
    model = blipfit.load("tiny")
    (tmp_path / "page.jpg").write_text("<html></html>")
    files = [tmp_path / "page.jpg", photo_files["deep"]]
    with pytest.warns(UserWarning, match=r"left out: .*page\.jpg is a web page"):
        assert len(model.search(files, "a star")) == 1
    names = []
    model.search(files, "a star", skip=lambda file, error: names.append(file.name))
    assert names == ["page.jpg"]


def test_a_runs_adapter_is_used(small, family, iconqa, tmp_path):
    changes = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=1", "data.images=off"]
    recipe = grid.recipe("iconqa", 31, str(small[family])).override([*changes, "training.learning_rate=0.03"])
    (run,) = loop.train([recipe], iconqa, tmp_path / "results", device="cpu")
    tuned, base = blipfit.load(adapter=run.folder), blipfit.load(str(small[family]))
    assert tuned.prompt_name == "iconqa-v1"
    picture = Image.new("RGB", (32, 32), "red")
    question = ("Which?", ["red", "blue", "green"])
    shown = tuned.rank(picture, *question)
    assert shown != base.rank(picture, *question, prompt="iconqa-v1")
    # The adapter folder alone knows its model; of the prompt it knows nothing.
    alone = blipfit.load(adapter=run.adapter)
    assert alone.rank(picture, *question, prompt="iconqa-v1") == shown
    run.result_file.unlink()
    with pytest.raises(UserError, match="is not finished"):
        blipfit.load(adapter=run.folder)


def test_an_adapter_of_another_model_is_refused(backbone, tmp_path):
    bank = Bank(backbone, [AdapterConfig()], [0])
    bank.values.add_(1)
    peft_format.save(tmp_path / "adapter", AdapterConfig(), bank.state(0), "elsewhere")
    with pytest.raises(UserError, match="was not trained on tiny-t5"):
        blipfit.load("tiny-t5", tmp_path / "adapter")
