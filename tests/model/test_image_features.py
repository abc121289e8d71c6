"""ImageFeatures: its three modes, and a key that depends on the tower but not on the trained layer norm."""

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
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.model import image_features, loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import AdapterConfig, ModelConfig


@pytest.fixture(scope="module", autouse=True)
def single_thread() -> Iterator[None]:
    """Use 1 thread: more do not speed up so small a tower, and slow it down while other cores decode images."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def backbone() -> Backbone:
    return loading.load(ModelConfig(name="tiny-t5"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[Question]:
    """20 questions about 19 images: the last two questions share an image."""
    folder, draws = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for n in range(19):
        Image.fromarray(draws.integers(0, 256, (40, 30 + n, 3), dtype=np.uint8)).save(folder / f"{n}.png")
    return [Question(f"q{n}", folder / f"{min(n, 18)}.png", "What?", "that") for n in range(20)]


@pytest.fixture
def stored(backbone: Backbone, tmp_path: Path) -> ImageFeatures:
    return ImageFeatures.from_backbone(backbone, "stored", tmp_path)


def plain_features(backbone: Backbone, questions: list[Question]) -> torch.Tensor:
    """Compute features without `ImageFeatures`."""
    pictures = [images.open_image(question.image) for question in questions]
    return backbone.see(images.to_pixels(pictures, backbone.image_size))


def augmented_features(backbone: Backbone, questions: list[Question], seed: int, epoch: int) -> torch.Tensor:
    size = backbone.image_size
    pictures = [
        images.augment(images.open_image(q.image), seed=seed, epoch=epoch, image_id=q.id, size=size) for q in questions
    ]
    return backbone.see(images.to_pixels(pictures, size))


def count_passes(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of images of every further pass of the tower."""
    passes: list[int] = []
    see = backbone.see
    monkeypatch.setattr(backbone, "see", lambda pixels: (passes.append(len(pixels)), see(pixels))[1])
    return passes


@pytest.mark.parametrize("mode", ["off", "shared"])
def test_off_and_shared_give_the_features_of_the_tower(mode, backbone: Backbone, questions: list[Question]):
    source, some = ImageFeatures.from_backbone(backbone, mode), questions[:4]
    assert torch.equal(source.features(some), plain_features(backbone, some))
    assert torch.equal(source.features(some, (42, 3)), augmented_features(backbone, some, 42, 3))
    assert not torch.equal(source.features(some, (42, 3)), plain_features(backbone, some))


def test_stored_features_are_rounded_from_the_first_call_on(stored, backbone, questions, tmp_path: Path):
    expected = plain_features(backbone, questions).half()
    first = stored.features(questions)
    assert first.dtype == torch.float16
    assert torch.equal(first, expected)
    assert torch.equal(ImageFeatures.from_backbone(backbone, "stored", tmp_path).features(questions), expected)


def test_stored_features_are_computed_once(stored: ImageFeatures, backbone, questions, tmp_path, monkeypatch):
    passes = count_passes(backbone, monkeypatch)
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


def test_stored_features_have_no_augmented_view(stored: ImageFeatures, questions: list[Question]):
    with pytest.raises(ValueError, match="no augmented view"):
        stored.features(questions, (42, 0))
    with pytest.raises(ValueError, match="no augmented view"):
        stored.prefetch([questions], (42, 0))


def test_the_model_answers_from_stored_features(stored: ImageFeatures, backbone: Backbone, questions: list[Question]):
    """The trained layer norm comes after the store, so 16-bit features pass through the stages."""
    encoded = backbone.text.encode([PromptedQuestion("Question: What? Short answer:", "(a) x", ("(a) x", "(b) y"))] * 2)
    batch = backbone.text.candidates(encoded)
    with torch.no_grad():
        exact = backbone.score_candidates(backbone.query(plain_features(backbone, questions[:2]), batch), batch).sums_KM
        rounded = backbone.score_candidates(backbone.query(stored.features(questions[:2]), batch), batch).sums_KM
    assert torch.allclose(rounded, exact, atol=0.02)


@pytest.mark.parametrize(
    ("mode", "view"), [("off", None), ("off", (42, 1)), ("shared", None), ("shared", (42, 1)), ("stored", None)]
)
def test_prefetch_gives_the_same_in_order(mode, view, backbone: Backbone, questions, tmp_path: Path):
    source = ImageFeatures.from_backbone(backbone, mode, tmp_path)
    batches = [questions[5:9], questions[:1], questions[12:20], questions[3:5]]
    expected = [source.features(batch, view) for batch in batches]
    threads: set[str] = set()
    for features, expected_features in zip(source.prefetch(batches, view), expected, strict=True):
        assert torch.equal(features, expected_features)
        threads |= {thread.name.split("_")[0] for thread in threading.enumerate()}
    assert "prefetch" in threads


def test_missing_features_are_announced(backbone: Backbone, questions: list[Question], tmp_path: Path):
    announcements: list[str] = []
    source = ImageFeatures.from_backbone(backbone, "stored", tmp_path, announcements.append)
    progress: list[int] = []
    assert len(source.missing(questions)) == 19
    assert source.prepare(questions, progress.append) == 19
    assert announcements == [
        f"image features: 19 images to compute once, 310 KiB in {tmp_path / image_features.feature_spec(backbone).key}"
    ]
    assert sum(progress) == 19
    assert source.prepare(questions, progress.append) == 0
    assert (len(announcements), sum(progress)) == (1, 19)


def test_off_has_nothing_to_prepare(backbone: Backbone, questions: list[Question], tmp_path: Path):
    assert ImageFeatures.from_backbone(backbone, "off", tmp_path).prepare(questions) == 0
    assert list(tmp_path.iterdir()) == []


def test_check_computes_again_and_compares(stored: ImageFeatures, questions: list[Question]):
    stored.prepare(questions[:10])
    comparison = stored.check(questions)  # images that are not stored are skipped
    assert (comparison.images, comparison.different, comparison.largest) == (10, [], 0.0)
    assert len(stored.missing(questions)) == 9


def test_models_with_the_same_tower_share_the_store(backbone: Backbone):
    vicuna = loading.load(ModelConfig(name="tiny-vicuna"))
    norm = copy.deepcopy(vicuna.hf.vision_model.post_layernorm)
    vicuna.hf.vision_model.load_state_dict(backbone.hf.vision_model.state_dict())
    vicuna.hf.vision_model.post_layernorm = norm
    assert image_features.feature_spec(vicuna) == image_features.feature_spec(backbone)


def test_the_key_depends_on_every_weight_but_the_trained_layer_norm(backbone: Backbone):
    key = image_features.feature_spec(backbone).key
    vision = backbone.hf.vision_model
    for name, tensor in vision.state_dict().items():
        original = tensor.clone()
        tensor.view(-1)[-1] += 1e-3
        assert (image_features.feature_spec(backbone).key == key) is name.startswith("post_layernorm."), name
        tensor.copy_(original)
    assert image_features.feature_spec(backbone).key == key


def test_the_key_depends_on_settings_and_precision(backbone: Backbone, monkeypatch: pytest.MonkeyPatch):
    key = image_features.feature_spec(backbone).key
    config = backbone.hf.vision_model.config
    monkeypatch.setattr(config, "num_attention_heads", 2)
    other_keys = {image_features.feature_spec(backbone).key}
    monkeypatch.undo()
    setting = torch.backends.mkldnn.matmul.fp32_precision
    torch.set_float32_matmul_precision("high")
    other_keys.add(image_features.feature_spec(backbone).key)
    torch.set_float32_matmul_precision("highest")
    torch.backends.mkldnn.matmul.fp32_precision = setting  # "highest" leaves "ieee" there, which was "none"
    other_keys.add(image_features.feature_spec(loading.load(ModelConfig(name="tiny-t5"), "bf16")).key)
    assert len(other_keys - {key}) == 3
    assert image_features.feature_spec(backbone).key == key


def test_a_bank_does_not_change_the_key(backbone: Backbone):
    key = image_features.feature_spec(backbone).key
    bank = Bank(backbone, [AdapterConfig(qformer=("ffn",), rank=1)] * 2, [1, 2])
    try:
        bank.values.add_(0.1)
        assert image_features.feature_spec(backbone).key == key
    finally:
        bank.remove()
