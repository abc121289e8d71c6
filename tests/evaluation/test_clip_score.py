"""CLIP score against transformers called directly, on a small random CLIP with the real CLIP vocabulary."""

import gzip
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPProcessor, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from blipfit.data import icons
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import clip_score, evaluate_open_answers
from blipfit.model import clip, tiny

BPE = Path(__file__).parents[2].parent / "shared" / "tokenizers" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
PHOTOS = Path(__file__).parents[2].parent / "shared" / "data" / "photos"


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in the vocabulary's order: printable ones for themselves, then new ones."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def write_tokenizer(folder: Path) -> None:
    """OpenAI's file of merges as the hub's `vocab.json` and `merges.txt`: 49 408 pieces."""
    merges = gzip.decompress(BPE.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    letters = byte_letters()
    pieces = letters + [letter + "</w>" for letter in letters] + ["".join(merge.split()) for merge in merges]
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: n for n, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))


# As the hub's copies of OpenAI's models have it: sizes as bare numbers, the old name of the class.
PREPROCESSOR = {
    "crop_size": 32,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 32,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not BPE.is_file():
        pytest.skip(f"no real CLIP vocabulary at {BPE}")
    folder = tmp_path_factory.mktemp("clip")
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=tower | {"vocab_size": 49408, "eos_token_id": 2, "max_position_embeddings": 77},
        vision_config=tower | {"image_size": 32, "patch_size": 8},
        projection_dim=16,
    )
    torch.manual_seed(0)
    model = CLIPModel(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:  # wide enough apart that no two texts and no two images look alike
                weight.normal_(std=1 if "embed" in name else 0.3)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


@pytest.fixture(scope="module")
def pairs() -> tuple[list[Image.Image], list[str]]:
    draw, noise = random.Random(1), np.random.default_rng(1)
    words = ["a", "photo", "of", "the", "red", "cat", "dog,", "running", "Łódź;", "3", "stars!", "🙂", "unbelievable"]
    texts = [" ".join(draw.choices(words, k=draw.choice([0, 1, 5, 12, 40, 90]))) for _ in range(40)]
    shapes = [(draw.randint(20, 90), draw.randint(20, 90), 3) for _ in texts]
    images = [Image.fromarray(noise.integers(0, 256, shape, dtype=np.uint8)) for shape in shapes]
    return images, texts


def scores_by_transformers(folder: Path, images: list[Image.Image], texts: list[str]) -> list[float]:
    """Scores by transformers alone, one pair at a time, from the model's own logits."""
    model = CLIPModel.from_pretrained(folder).eval()
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(folder), CLIPTokenizer.from_pretrained(folder))
    scores = []
    for image, text in zip(images, texts, strict=True):
        inputs = processor(text=[text], images=image, return_tensors="pt", truncation=True, max_length=77)
        with torch.no_grad():
            scores.append(100 * max(0.0, (model(**inputs).logits_per_image / model.logit_scale.exp()).item()))
    return scores


def test_the_tokenizer_of_these_tests_is_clips(checkpoint: Path):
    ids = CLIPTokenizer.from_pretrained(checkpoint)("a photo of a cat").input_ids
    assert ids == [49406, 320, 1125, 539, 320, 2368, 49407]


def test_equals_transformers_called_directly(checkpoint: Path, pairs):
    images, texts = pairs
    clip_model = clip.load(str(checkpoint))
    expected = scores_by_transformers(checkpoint, images, texts)
    for batch_size in (1, 7, 64):
        scores = clip_score.score(clip_model, images, texts, batch_size)
        np.testing.assert_allclose(scores.values, expected, rtol=0, atol=1e-4)
        assert (
            scores.truncated_texts == sum(len(clip_model.tokenizer(t, verbose=False).input_ids) > 77 for t in texts) > 3
        )
    # Some scores are clamped to 0, some are not, and they differ: the test cannot pass by chance.
    assert min(expected) == 0
    assert 5 < sum(value > 0 for value in expected) < 35
    assert np.std(expected) > 1


class BareFeatures(torch.nn.Module):
    """A CLIP whose features are tensors, as torchmetrics 1.9 expects and transformers 5 no longer returns them."""

    def __init__(self, model: CLIPModel):
        super().__init__()
        self.model, self.config = model, model.config

    def get_text_features(self, *ids_and_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_text_features(*ids_and_mask).pooler_output

    def get_image_features(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_features(pixels).pooler_output


def test_equals_torchmetrics(checkpoint: Path, pairs):
    metrics = pytest.importorskip("torchmetrics.functional.multimodal", reason="torchmetrics is not installed")
    clip_model = clip.load(str(checkpoint))
    model = BareFeatures(clip_model.model)
    processor = CLIPProcessor(CLIPImageProcessorPil.from_pretrained(checkpoint), clip_model.tokenizer)
    compared = 0
    for image, text in zip(*pairs, strict=True):
        scores = clip_score.score(clip_model, [image], [text])
        if scores.truncated_texts:
            continue  # torchmetrics also removes the end token, so CLIP pools at another token
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        with torch.no_grad():
            expected = metrics.clip_score(pixels, text, model_name_or_path=lambda: (model, processor))
        assert scores.values[0] == pytest.approx(expected.item(), abs=1e-4)
        compared += 1
    assert compared > 20


def test_both_means_are_offered_by_name(checkpoint: Path, pairs):
    """Some cosines are negative, so clamping every pair and clamping the mean differ."""
    clip_model = clip.load(str(checkpoint))
    scores = clip_score.score(clip_model, *pairs)
    assert min(scores.cosines) < 0
    assert scores.values == tuple(max(cosine, 0.0) for cosine in scores.cosines)
    assert scores.mean_of_clamped == pytest.approx(np.mean(scores.values))
    assert scores.clamped_mean == pytest.approx(max(np.mean(scores.cosines), 0))
    assert scores.mean_of_clamped > scores.clamped_mean
    negative = clip_score.ClipScores((0.0, 0.0), 0, (-1.0, -3.0))
    assert (negative.mean_of_clamped, negative.clamped_mean) == (0, 0)
    empty = clip_score.ClipScores((), 0)
    assert (empty.mean_of_clamped, empty.clamped_mean) == (None, None)


def test_a_score_that_is_not_finite_is_an_error(pairs):
    clip_model = clip.load("tiny-clip")
    with torch.no_grad():
        clip_model.model.text_projection.weight.fill_(math.nan)
    with pytest.raises(UserError, match=r"the CLIP score of pair 1 \('a star'\) is nan"):
        clip_score.score(clip_model, pairs[0][:2], ["a star", "b"])


def test_a_text_of_77_tokens_is_read_whole_and_one_of_78_is_truncated(checkpoint: Path, pairs):
    clip_model = clip.load(str(checkpoint))
    image = pairs[0][0]
    fits, longer, much_longer = (" ".join(["cat"] * n) for n in (75, 76, 200))
    scores = clip_score.score(clip_model, [image] * 3, [fits, longer, much_longer])
    assert scores.truncated_texts == 2
    assert scores.values[1] == pytest.approx(scores.values[0], abs=1e-4)
    assert scores.values[2] == pytest.approx(scores.values[0], abs=1e-4)


def test_no_pairs_give_no_scores_and_unpaired_texts_are_an_error(checkpoint: Path):
    assert clip_score.score(clip.load(str(checkpoint)), [], []) == clip_score.ClipScores((), 0)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        clip_score.score(clip.load(str(checkpoint)), [], ["a text"])


def test_the_miniature_clip_gives_the_scores_of_transformers(tmp_path: Path):
    clip_model = clip.load("tiny-clip")
    icons.write_preferences(tmp_path, n=8)
    rows = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    scores = clip_score.score(
        clip_model, [tmp_path / row["image"] for row in rows], [row["response"][0] for row in rows]
    )
    processor = CLIPProcessor.from_pretrained(tiny.clip_folder())
    model = CLIPModel.from_pretrained(tiny.clip_folder()).eval()
    for row, score in zip(rows, scores.values, strict=True):
        image = Image.open(tmp_path / row["image"]).convert("RGB")
        with torch.no_grad():
            out = model(**processor(text=[row["response"][0]], images=image, return_tensors="pt"))
        cosine = (out.image_embeds * out.text_embeds).sum().item()
        assert score == pytest.approx(100 * max(cosine, 0), abs=1e-4)
    assert (clip_model.text_length, scores.truncated_texts) == (64, 0)
    assert clip_score.score(clip_model, [tmp_path / rows[0]["image"]], ["red star " * 40]).truncated_texts == 1


def test_photographs_are_opened_from_their_files():
    if not PHOTOS.is_dir():
        pytest.skip(f"no photographs at {PHOTOS}")
    files = sorted(file for file in PHOTOS.iterdir() if file.suffix in (".jpg", ".png"))
    clip_model = clip.load("tiny-clip")
    images = [Image.open(file).convert("RGB") for file in files]
    texts = ["a red star"] * len(files)
    assert clip_score.score(clip_model, files, texts).values == pytest.approx(
        clip_score.score(clip_model, images, texts).values, abs=1e-3
    )


def copy_checkpoint(checkpoint: Path, to: Path, **config) -> Path:
    to.mkdir()
    for file in checkpoint.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    (to / "config.json").write_text(json.dumps(json.loads((to / "config.json").read_text()) | config))
    return to


def test_transparent_pixels_are_shown_as_the_question_says(tmp_path: Path):
    """Published data sets drop transparency, other images are shown on white; both as in the model's input."""
    file = tmp_path / "drawing.png"
    drawing = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    drawing.paste((0, 0, 0, 255), (16, 16, 48, 48))
    drawing.save(file)
    clip_model = clip.load(tiny.CLIP_NAME)
    texts = ["a black square"]
    on_white = clip_score.score(clip_model, [file], texts)
    assert clip_score.score(clip_model, [file], texts, transparency=["white"]) == on_white
    dropped = clip_score.score(clip_model, [file], texts, transparency=["dropped"])
    assert dropped == clip_score.score(clip_model, [Image.new("RGB", (64, 64))], texts)
    assert dropped.cosines != on_white.cosines
    split = EncodedSplit([Question("1", file, "", "", transparency="dropped")], [PromptedQuestion("", "", ())], [])
    assert evaluate_open_answers.score_clip(clip_model, split, texts, 4) == dropped


def test_wrong_models_are_refused(checkpoint: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"a model of type 'instructblip'; the CLIP score needs one of type 'clip'"):
        clip.load(str(tiny.folder("t5")))
    with pytest.raises(UserError, match="unknown CLIP 'clip': give a hub name"):
        clip.load("clip")
    with pytest.raises(UserError, match="is not a model folder"):
        clip.load(str(tmp_path))
    text = json.loads((checkpoint / "config.json").read_text())["text_config"]
    other_end = copy_checkpoint(checkpoint, tmp_path / "end", text_config=text | {"eos_token_id": 49000})
    with pytest.raises(UserError, match="ends a text with id 49407, the model reads it at id 49000"):
        clip.load(str(other_end))
    deeper = copy_checkpoint(checkpoint, tmp_path / "deep", text_config=text | {"num_hidden_layers": 3})
    with pytest.raises(UserError, match=r"16 weights are missing, e.g. text_model.encoder.layers.2"):
        clip.load(str(deeper))
    broken = copy_checkpoint(checkpoint, tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        clip.load(str(broken))


def test_loading_prints_nothing_and_fails_at_once_offline(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    clip.load("tiny-clip")
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"offline: `nobody/clip` is not in the local cache; give a folder with a CLIP"):
        clip.load("nobody/clip")
    assert time.monotonic() - start < 1
