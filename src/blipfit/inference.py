"""The public Python API: `blipfit.load(...)` gives a model that answers, describes, ranks and searches images.

`B` images, `P` image tokens, `D` width, `M` wordings of a text.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blipfit import grid
from blipfit.adapters import open_model
from blipfit.data import annotations, feature_store, not_an_image
from blipfit.data import images as image_files
from blipfit.data.image_hashes import hash_image
from blipfit.data.prompts import PromptedQuestion, get_prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import generation
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.runtime import distributed

ImageSource = str | Path | bytes | Image.Image | np.ndarray
"""An image file or its content, or an image in memory (an array: height × width, or × 3 or 4 channels, of 8 bits)."""
OnSkipped = Callable[[Path, UserError], None]
"""Receives every image that is left out, with the reason."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".gif", ".tif", ".tiff")
CAPTION_PROMPT = "caption-v1"
OPEN_PROMPTS = ("vqa-v1", "instruction-v1")
"""Prompts for questions without choices."""
_DETERMINERS = frozenset(
    ["a", "an", "the", "one", "no", "some", "many", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
)


@dataclass(frozen=True, slots=True)
class RankedChoice:
    """A choice with its summed log-likelihood, and its probability among all choices."""

    choice: str
    log_likelihood: float
    probability: float


@dataclass(frozen=True, slots=True)
class Match:
    """An image with the log-likelihood that it gives a text, above the one that a plain gray image gives it."""

    image: Path
    score: float


def load(
    model: str | Path | None = None,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    announce: Callable[[str], None] = lambda sentence: None,
) -> "Model":
    """Load a model, with the adapter of a finished run or of an adapter folder.

    `model` is a hub name, a local folder, or a miniature (`tiny` is `tiny-t5`); if absent, the model that the adapter
    was trained on, and without an adapter the published Flan-T5-XL. `precision`: auto, fp32, bf16 or fp16. `announce`
    receives a sentence before a long build of image features, and `Model.warnings`: the adapter was trained on other
    base weights than those of `model`. Raises UserError if an argument has the wrong type, if a model or adapter cannot
    be used, or if they do not fit each other.
    """
    for name, value in (("model", model), ("adapter", adapter)):
        if not isinstance(value, str | Path | None):
            raise UserError(f"{name} must be a name or a path, not {type(value).__name__}")
    torch_device = distributed.select_device(device)
    loading.low_precision_dtype(precision, torch_device)
    if adapter is None:
        source = open_model.locate_model(ModelConfig(name=grid.model_name("t5", None if model is None else str(model))))
    else:
        source = open_model.locate_adapter(Path(adapter), None if model is None else ModelConfig(name=str(model)))
    opened = open_model.load(source, torch_device, precision)
    opened.install_adapter()
    for warning in opened.source.warnings:
        announce(warning)
    prompt = None if source.recipe is None else source.recipe.data.prompt
    return Model(opened.backbone, prompt, announce, opened.source.warnings)


class Model:
    """A loaded InstructBLIP; `prompt_name` is the prompt that its adapter was trained with, if any.

    `warnings`: sentences that belong to every answer, see `adapters.open_model.Source`.
    """

    def __init__(
        self,
        backbone: Backbone,
        prompt_name: str | None = None,
        announce: Callable[[str], None] = lambda sentence: None,
        warnings: Sequence[str] = (),
    ):
        self.backbone, self.announce, self.warnings = backbone, announce, tuple(warnings)
        self.prompt_name = prompt_name or OPEN_PROMPTS[0]
        self._store: ImageFeatures | None = None

    def ask(
        self,
        image: ImageSource,
        question: str,
        *,
        context: str = "",
        prompt: str | None = None,
        decoding: str | generation.Decoding = "short-answer",
    ) -> str:
        """Answer a question in the model's own words.

        Raises UserError if the image cannot be read, or if the prompt or decoding is unknown.
        """
        name = prompt or (self.prompt_name if self.prompt_name in OPEN_PROMPTS else OPEN_PROMPTS[0])
        (answer,) = self._generate([image], _prompted(name, question, context=context), decoding, 1)
        return answer

    def caption(self, image: ImageSource, decoding: str | generation.Decoding = "caption") -> str:
        """Describe an image in one sentence. Raises UserError as `captions` does."""
        return self.captions([image], decoding)[0]

    def captions(
        self, images: Iterable[ImageSource], decoding: str | generation.Decoding = "caption", batch_size: int = 16
    ) -> list[str]:
        """Describe every image in one sentence; `batch_size` images at once give the same sentences as one by one.

        Raises UserError if an image cannot be read, or if the decoding is unknown.
        """
        sources = [images] if isinstance(images, ImageSource) else list(_require_items(images, "images"))
        _require_count(batch_size, "batch_size")
        return self._generate(sources, _prompted(CAPTION_PROMPT), decoding, batch_size)

    def rank(
        self,
        image: ImageSource,
        question: str,
        choices: Iterable[str],
        *,
        context: str = "",
        prompt: str | None = None,
    ) -> list[RankedChoice]:
        """Order the choices of a question by their log-likelihood, the likeliest first.

        Raises UserError if there are fewer than two choices, or if the image or prompt cannot be used.
        """
        if isinstance(choices, str):
            raise UserError("choices must be a list of texts, not a text")
        choices = tuple(_require_items(choices, "choices"))
        if len(choices) < 2:
            raise UserError("ranking needs two choices at least")
        prompted = _prompted(prompt or self.prompt_name, question, choices, context)
        sums = self._score_candidates(self._see([image]), prompted)[0].tolist()
        total = math.log(math.fsum(math.exp(value - max(sums)) for value in sums)) + max(sums)
        ranked = [RankedChoice(c, value, math.exp(value - total)) for c, value in zip(choices, sums, strict=True)]
        return sorted(ranked, key=lambda choice: -choice.log_likelihood)

    def search(
        self,
        images: str | Path | Sequence[str | Path],
        text: str,
        top: int = 9,
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda done: None,
        skip: OnSkipped | None = None,
    ) -> list[Match]:
        """The `top` images, in a folder and its subfolders or in a list, for which the text is the likeliest caption.

        Image features go to the feature store, so that the next search in these images is fast. `advance` receives the
        number of images as they are computed. An image that cannot be read is left out: `skip` receives it, by default
        as a Python warning. Raises UserError if there are no images that can be read, or if `text` is empty.
        """
        _require_count(top, "top")
        _require_count(batch_size, "batch_size")
        prompted = PromptedQuestion(_prompted(CAPTION_PROMPT).prompt, text, wordings(text))
        image_features = self._stored_features()
        files = self._usable_files(find_images(images), skip or _warn)
        questions = [Question(str(file), file, "", "") for file in files]
        image_features.prepare(questions, advance)
        (gray_score,) = self._score_candidates(self._see_gray(), prompted).logsumexp(1).tolist()
        matches: list[Match] = []
        for start in range(0, len(files), batch_size):
            features = image_features.features(questions[start : start + batch_size])
            scores = self._score_candidates(features, prompted).logsumexp(1).tolist()
            batch = zip(files[start : start + batch_size], scores, strict=True)
            matches += [Match(file, score - gray_score) for file, score in batch]
        return sorted(matches, key=lambda match: -match.score)[:top]

    def _usable_files(self, files: Sequence[Path], skip: OnSkipped) -> list[Path]:
        """Return the files that can be decoded; those whose features are stored are not decoded again."""
        store = self._stored_features().store
        assert store is not None

        def check(file: Path) -> UserError | None:
            try:
                if store.missing([hash_image(file, "white")]):
                    image_files.open_image(file)
            except UserError as error:
                return error
            return None

        with ThreadPoolExecutor(feature_store.thread_count()) as pool:
            return select_usable(files, pool.map(check, files), skip)

    def _stored_features(self) -> ImageFeatures:
        if self._store is None:
            self._store = ImageFeatures.from_backbone(self.backbone, "stored", announce=self.announce)
        return self._store

    def _see(self, images: Sequence[ImageSource]) -> Tensor:
        """Image features `B × P × D`."""
        size = self.backbone.image_size
        opened = [image_files.resize(open_source(image), size) for image in images]
        return self.backbone.see(image_files.to_pixels(opened, size).to(self.backbone.device))

    def _see_gray(self) -> Tensor:
        """Features `1 × P × D` of a plain gray image."""
        size = self.backbone.image_size
        return self.backbone.see(torch.zeros(1, 3, size, size, device=self.backbone.device))

    def _generate(
        self,
        images: Sequence[ImageSource],
        prompted: PromptedQuestion,
        decoding: str | generation.Decoding,
        batch_size: int,
    ) -> list[str]:
        if isinstance(decoding, str):
            decoding = generation.get_preset(decoding)
        if not isinstance(decoding, generation.Decoding):
            raise UserError(f"decoding must be a name or a Decoding, but is of the type {type(decoding).__name__}")
        encoded = self.backbone.text.encode([prompted], whole_prompts=True) * len(images)
        texts: list[str]
        (texts,) = generation.generate(
            self.backbone, encoded, lambda rows: self._see([images[i] for i in rows]), decoding, batch_size
        )
        return texts

    def _score_candidates(self, features_BPD: Tensor, prompted: PromptedQuestion) -> Tensor:
        """Log-likelihoods `B × M` of the same candidates for every image."""
        B = len(features_BPD)
        encoded = self.backbone.text.encode([prompted], whole_prompts=True)
        if encoded[0].cut_candidates:
            raise UserError(
                f"a choice or text is longer than {self.backbone.text.max_target} tokens, of which only the beginning "
                "would be scored; shorten it"
            )
        batch = self.backbone.text.candidates(encoded * B).to(self.backbone.device)
        with torch.no_grad():
            sums_BM = (
                self.backbone.score_candidates(self.backbone.query(features_BPD, batch), batch).sums_KM[0].view(B, -1)
            )
        if not sums_BM.isfinite().all():
            raise UserError(
                "the model's scores are NaN or infinite; check the weights of model and adapter, or use precision fp32"
            )
        return sums_BM


def wordings(text: str) -> tuple[str, ...]:
    """A text as captions begin: as it is, and with an article if it has no determiner.

    People search for `red star`, and captions say `a red star`; the sum of both likelihoods finds the images that
    either finds (measured on drawn images). Raises UserError if the text is empty.
    """
    if not isinstance(text, str):
        raise UserError(f"the text must be a text, but is of the type {type(text).__name__}")
    annotations.require_whole_characters(text, "the text")
    words = text.split()
    if not words:
        raise UserError("say what to search for")
    query, first = " ".join(words), words[0].lower()
    if first in _DETERMINERS or first[0].isdigit():
        return (query,)
    return query, f"{'an' if first[0] in 'aeiou' else 'a'} {query}"


def _prompted(name: str, question: str = "", choices: tuple[str, ...] = (), context: str = "") -> PromptedQuestion:
    texts = {"the prompt's name": name, "the question": question, "the context": context}
    for what, text in (*texts.items(), *(("a choice", choice) for choice in choices)):
        if not isinstance(text, str):
            raise UserError(f"{what} must be a text, but is of the type {type(text).__name__}")
        annotations.require_whole_characters(text, what)
    return get_prompt(name)(Question("", Path(), question, "", choices, None, context))


def open_source(source: ImageSource) -> Image.Image:
    """Return an image in RGB, from a file, its content, or an image in memory; transparency is shown on white.

    All of them give the same pixels. Raises UserError if the image cannot be used.
    """
    if isinstance(source, Image.Image):
        return image_files.convert_image(source)
    if isinstance(source, bytes):
        return image_files.decode_image(source, "the image")
    if isinstance(source, np.ndarray):
        return image_files.convert_image(_array_image(source))
    if not isinstance(source, str | Path):
        raise UserError(f"an image must be a file, a PIL image or an array, but is of the type {type(source).__name__}")
    if isinstance(source, str) and (reason := not_an_image.explain_why_no_path(source)):
        raise UserError(f"the image {reason}")
    return image_files.open_image(Path(source))


def _require_items(values: Iterable[Any], what: str) -> Iterable[Any]:
    """Return `values` if they are several; raises UserError for a single value, which is no list."""
    if not isinstance(values, Iterable):
        raise UserError(f"{what} must be a list, but is of the type {type(values).__name__}")
    return values


def _require_count(number: int, what: str) -> None:
    if not isinstance(number, int) or number < 1:
        raise UserError(f"{what} is {number!r:.100}; it must be a whole number of 1 or more")


def _array_image(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))
    if array.dtype not in (np.uint8, np.uint16) or not is_image or (array.dtype == np.uint16 and array.ndim == 3):
        raise UserError(
            f"an image array must be height x width, or height x width x 3 or 4 channels, of the type uint8, but is "
            f"{' x '.join(map(str, array.shape))} of the type {array.dtype}"
        )
    if not array.size:
        raise UserError("the image array is empty")
    return Image.fromarray(array)


def find_images(images: str | Path | Iterable[str | Path]) -> list[Path]:
    """Return the image files in a folder and its subfolders, by their suffix; of a list, the files in the list.

    Files and folders whose names begin with a dot are skipped. Raises UserError if there are none.
    """
    if not isinstance(images, str | Path):
        files = [_require_path(image) for image in _require_items(images, "images")]
        if not files:
            raise UserError("the list of images is empty")
        return files
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of images")
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in SUFFIXES
        and not file.is_dir()
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    )
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return files


def _require_path(image: str | Path) -> Path:
    if not isinstance(image, str | Path):
        raise UserError(f"an image to search must be a path, but is of the type {type(image).__name__}")
    return Path(image)


def select_usable(files: Sequence[Path], errors: Iterable[UserError | None], skip: OnSkipped) -> list[Path]:
    """Return the files without an error, and give the others to `skip`; raises UserError if none is left."""
    failed = {file: error for file, error in zip(files, errors, strict=True) if error is not None}
    usable = [file for file in files if file not in failed]
    if failed and not usable:
        first = next(iter(failed.values()))
        raise first if len(failed) == 1 else UserError(f"none of {len(failed)} images can be used; the first: {first}")
    for file, error in failed.items():
        skip(file, error)
    return usable


def _warn(file: Path, error: UserError) -> None:
    warnings.warn(f"left out: {error}", stacklevel=2)
