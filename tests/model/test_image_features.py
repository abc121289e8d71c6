"""ImageFeatures: the three modes give what they promise, and the key knows the tower and not the trained layer norm."""

import copy
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.adapters.bank import Bank
from blipfit.data import images
from blipfit.data.prompts import Prompted
from blipfit.data.question import Question
from blipfit.model import image_features, loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import AdapterConfig, ModelConfig


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a tower gains nothing from more, and loses much where the cores are busy with decoding."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return loading.load(ModelConfig(name="tiny-t5"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """20 questions about 19 images: the last two share theirs."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for n in range(19):
        Image.fromarray(draws.integers(0, 256, (40, 30 + n, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return [Question(f"q{n}", folder / f"{min(n, 18)}.png", "What?", "that") for n in range(20)]


@pytest.fixture
def stored(backbone: Backbone, tmp_path: Path) -> ImageFeatures:
    return ImageFeatures.from_backbone(backbone, "stored", tmp_path)


def plain(backbone: Backbone, questions: list[Question]) -> torch.Tensor:
    """What the tower makes of the pictures, by the shortest way."""
    opened = [images.open_image(question.image) for question in questions]
    return backbone.see(images.pixels(opened, backbone.image_size))


def augmented(backbone: Backbone, questions: list[Question], seed: int, epoch: int) -> torch.Tensor:
    size = backbone.image_size
    opened = [
        images.augment(images.open_image(q.image), seed=seed, epoch=epoch, image_id=q.id, size=size) for q in questions
    ]
    return backbone.see(images.pixels(opened, size))


def counting(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of images of every pass of the tower from now on."""
    passes: list[int] = []
    see = backbone.see
    monkeypatch.setattr(backbone, "see", lambda pixels: (passes.append(len(pixels)), see(pixels))[1])
    return passes


@pytest.mark.parametrize("mode", ["off", "shared"])
def test_off_and_shared_give_what_the_tower_gives(mode, backbone: Backbone, questions: list[Question]):
    found, some = ImageFeatures.from_backbone(backbone, mode), questions[:4]
    assert torch.equal(found.features(some), plain(backbone, some))
    assert torch.equal(found.features(some, (42, 3)), augmented(backbone, some, 42, 3))
    assert not torch.equal(found.features(some, (42, 3)), plain(backbone, some))


def test_stored_gives_the_rounded_value_first_and_ever_after(stored, backbone, questions, tmp_path: Path):
    expected = plain(backbone, questions).half()
    first = stored.features(questions)
    assert first.dtype == torch.float16
    assert torch.equal(first, expected)
    assert torch.equal(ImageFeatures.from_backbone(backbone, "stored", tmp_path).features(questions), expected)


def test_stored_never_sees_an_image_twice(stored: ImageFeatures, backbone, questions, tmp_path, monkeypatch):
    passes = counting(backbone, monkeypatch)
    stored.prepare(questions)
    assert passes == [16, 16]  # 19 images, the last pass filled up
    stored.features(questions)
    list(stored.prefetch([questions[:3], questions[3:]]))
    list(ImageFeatures.from_backbone(backbone, "stored", tmp_path).prefetch([questions]))
    assert len(passes) == 2


def test_stored_values_do_not_depend_on_the_callers_autocast(
    stored: ImageFeatures, backbone, questions, tmp_path: Path
):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = stored.features(questions)
    assert torch.equal(inside, ImageFeatures.from_backbone(backbone, "stored", tmp_path / "other").features(questions))


def test_stored_has_no_augmented_view(stored: ImageFeatures, questions: list[Question]):
    with pytest.raises(ValueError, match="plain view"):
        stored.features(questions, (42, 0))
    with pytest.raises(ValueError, match="plain view"):
        stored.prefetch([questions], (42, 0))


def test_the_model_answers_from_stored_features(stored: ImageFeatures, backbone: Backbone, questions: list[Question]):
    """The trained layer norm comes after the store: 16-bit features go through the stages as they are."""
    encoded = backbone.text.encode([Prompted("Question: What? Short answer:", "(a) x", ("(a) x", "(b) y"))] * 2)
    batch = backbone.text.candidates(encoded)
    with torch.no_grad():
        near = backbone.score(backbone.query(plain(backbone, questions[:2]), batch), batch).sums_KM
        found = backbone.score(backbone.query(stored.features(questions[:2]), batch), batch).sums_KM
    assert torch.allclose(found, near, atol=0.02)


@pytest.mark.parametrize(
    ("mode", "view"), [("off", None), ("off", (42, 1)), ("shared", None), ("shared", (42, 1)), ("stored", None)]
)
def test_prefetch_gives_the_same_in_order(mode, view, backbone: Backbone, questions, tmp_path: Path):
    found = ImageFeatures.from_backbone(backbone, mode, tmp_path)
    batches = [questions[5:9], questions[:1], questions[12:20], questions[3:5]]
    expected = [found.features(batch, view) for batch in batches]
    threads: set[str] = set()
    for got, wanted in zip(found.prefetch(batches, view), expected, strict=True):
        assert torch.equal(got, wanted)
        threads |= {thread.name.split("_")[0] for thread in threading.enumerate()}
    assert "ahead" in threads


def test_what_is_to_be_built_is_announced(backbone: Backbone, questions: list[Question], tmp_path: Path):
    said: list[str] = []
    found = ImageFeatures.from_backbone(backbone, "stored", tmp_path, said.append)
    done: list[int] = []
    assert len(found.missing(questions)) == 19
    assert found.prepare(questions, done.append) == 19
    assert said == [
        f"image features: 19 images to see once, 310 KiB in {tmp_path / image_features.facts(backbone).key}"
    ]
    assert sum(done) == 19
    assert found.prepare(questions, done.append) == 0
    assert (len(said), sum(done)) == (1, 19)


def test_off_has_nothing_to_prepare(backbone: Backbone, questions: list[Question], tmp_path: Path):
    assert ImageFeatures.from_backbone(backbone, "off", tmp_path).prepare(questions) == 0
    assert list(tmp_path.iterdir()) == []


def test_check_sees_again_and_compares(stored: ImageFeatures, questions: list[Question]):
    stored.prepare(questions[:10])
    found = stored.check(questions)  # those not stored are no business of a check
    assert (found.images, found.different, found.largest) == (10, [], 0.0)
    assert len(stored.missing(questions)) == 9


def test_models_with_one_tower_share_the_store(backbone: Backbone):
    vicuna = loading.load(ModelConfig(name="tiny-vicuna"))
    norm = copy.deepcopy(vicuna.hf.vision_model.post_layernorm)
    vicuna.hf.vision_model.load_state_dict(backbone.hf.vision_model.state_dict())
    vicuna.hf.vision_model.post_layernorm = norm
    assert image_features.facts(vicuna) == image_features.facts(backbone)


def test_the_key_knows_every_weight_but_the_trained_layer_norm(backbone: Backbone):
    key = image_features.facts(backbone).key
    vision = backbone.hf.vision_model
    for name, tensor in vision.state_dict().items():
        kept = tensor.clone()
        tensor.view(-1)[-1] += 1e-3
        assert (image_features.facts(backbone).key == key) is name.startswith("post_layernorm."), name
        tensor.copy_(kept)
    assert image_features.facts(backbone).key == key


def test_the_key_knows_settings_and_precision(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    key = image_features.facts(backbone).key
    config = backbone.hf.vision_model.config
    monkeypatch.setattr(config, "num_attention_heads", 2)
    other = {image_features.facts(backbone).key}
    monkeypatch.undo()
    setting = torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision("high")
    other.add(image_features.facts(backbone).key)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = setting  # "highest" leaves "ieee" there, which was "none"
    other.add(image_features.facts(loading.load(ModelConfig(name="tiny-t5"), "bf16")).key)
    assert len(other - {key}) == 3
    assert image_features.facts(backbone).key == key


def test_a_bank_does_not_change_the_key(backbone: Backbone):
    key = image_features.facts(backbone).key
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [1, 2])
    try:
        bank.values.add_(0.1)
        assert image_features.facts(backbone).key == key
    finally:
        bank.remove()
