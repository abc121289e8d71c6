"""The public Python API: `blipfit.load(...)` gives a model that answers, describes, ranks and searches images.

`B` images, `P` image tokens, `D` width, `M` wordings of a text.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blipfit import grid
from blipfit.adapters import opening
from blipfit.data import images as image_files
from blipfit.data.prompts import PromptedQuestion, get_prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import generation
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.runtime import distributed

ImageSource = str | Path | Image.Image
"""An image file, or an image in memory."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
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
    model: str | None = None,
    adapter: str | Path | None = None,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
    announce: Callable[[str], None] = lambda sentence: None,
) -> "Model":
    """Load a model, with the adapter of a finished run or of an adapter folder.

    `model` is a hub name, a local folder, or a miniature (`tiny` is `tiny-t5`); if absent, the model that the adapter
    was trained on, and without an adapter the published Flan-T5-XL. `announce` receives a sentence before a long build
    of image features. Raises UserError if a model or adapter cannot be used, or if they do not fit each other.
    """
    base = None if model is None else ModelConfig(name=grid.model_name("t5", model))
    if adapter is None:
        source = opening.locate(base or ModelConfig(name=grid.MODELS["t5"]))
    else:
        source = opening.locate_adapter(Path(adapter), base)
    torch_device = distributed.select_device(device) if isinstance(device, str | None) else device
    opened = opening.load(source, torch_device, precision)
    opened.install_adapter()
    return Model(opened.backbone, None if source.recipe is None else source.recipe.data.prompt, announce)


class Model:
    """A loaded InstructBLIP; `prompt_name` is the prompt that its adapter was trained with, if any."""

    def __init__(
        self,
        backbone: Backbone,
        prompt_name: str | None = None,
        announce: Callable[[str], None] = lambda sentence: None,
    ):
        self.backbone, self.announce = backbone, announce
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
        self, images: Sequence[ImageSource], decoding: str | generation.Decoding = "caption", batch_size: int = 16
    ) -> list[str]:
        """Describe every image in one sentence; `batch_size` images at once give the same sentences as one by one.

        Raises UserError if an image cannot be read, or if the decoding is unknown.
        """
        return self._generate(images, _prompted(CAPTION_PROMPT), decoding, batch_size)

    def rank(
        self,
        image: ImageSource,
        question: str,
        choices: Sequence[str],
        *,
        context: str = "",
        prompt: str | None = None,
    ) -> list[RankedChoice]:
        """Order the choices of a question by their log-likelihood, the likeliest first.

        Raises UserError if there are fewer than two choices, or if the image or prompt cannot be used.
        """
        if len(choices) < 2:
            raise UserError("ranking needs two choices at least")
        prompted = _prompted(prompt or self.prompt_name, question, tuple(choices), context)
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
    ) -> list[Match]:
        """The `top` images, in a folder and its subfolders or in a list, for which the text is the likeliest caption.

        Image features go to the feature store, so that the next search in these images is fast. `advance` receives the
        number of images as they are computed. Raises UserError if there are no images or one cannot be read, or if
        `text` is empty.
        """
        files = _image_files(images)
        prompted = PromptedQuestion(_prompted(CAPTION_PROMPT).prompt, text, wordings(text))
        image_features = self._stored_features()
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

    def _stored_features(self) -> ImageFeatures:
        if self._store is None:
            self._store = ImageFeatures.from_backbone(self.backbone, "stored", announce=self.announce)
        return self._store

    def _see(self, images: Sequence[ImageSource]) -> Tensor:
        """Image features `B × P × D`."""
        opened = [
            image.convert("RGB") if isinstance(image, Image.Image) else image_files.open_image(Path(image))
            for image in images
        ]
        return self.backbone.see(image_files.to_pixels(opened, self.backbone.image_size).to(self.backbone.device))

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
        encoded = self.backbone.text.encode([prompted]) * len(images)
        texts: list[str]
        (texts,) = generation.generate(
            self.backbone, encoded, lambda rows: self._see([images[i] for i in rows]), decoding, batch_size
        )
        return texts

    def _score_candidates(self, features_BPD: Tensor, prompted: PromptedQuestion) -> Tensor:
        """Log-likelihoods `B × M` of the same candidates for every image."""
        B = len(features_BPD)
        batch = self.backbone.text.candidates(self.backbone.text.encode([prompted]) * B).to(self.backbone.device)
        with torch.no_grad():
            return self.backbone.score(self.backbone.query(features_BPD, batch), batch).sums_KM[0].view(B, -1)


def wordings(text: str) -> tuple[str, ...]:
    """A text as captions begin: as it is, and with an article if it has no determiner.

    People search for `red star`, and captions say `a red star`; the sum of both likelihoods finds the images that
    either finds (measured on drawn images). Raises UserError if the text is empty.
    """
    words = text.split()
    if not words:
        raise UserError("say what to search for")
    query, first = " ".join(words), words[0].lower()
    if first in _DETERMINERS or first[0].isdigit():
        return (query,)
    return query, f"{'an' if first[0] in 'aeiou' else 'a'} {query}"


def _prompted(name: str, question: str = "", choices: tuple[str, ...] = (), context: str = "") -> PromptedQuestion:
    return get_prompt(name)(Question("", Path(), question, "", choices, None, context))


def _image_files(images: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(images, str | Path):
        return [Path(image) for image in images]
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of images")
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not files:
        raise UserError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
    return files
