"""A model to be used: asked, let describe pictures, rank answers, and search pictures by a text.

`B` images, `P` image tokens, `D` width, `M` wordings.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blipfit import grid
from blipfit.adapters import peft_format
from blipfit.data import images as pictures
from blipfit.data.prompts import Prompted, prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import generation
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.run import Run
from blipfit.runtime import distributed

Picture = str | Path | Image.Image
"""A file, or a picture in memory."""

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
CAPTION = "caption-v1"
FREELY = ("vqa-v1", "instruction-v1")
"""Prompts that an open question can be put in."""
_BEGUN = {
    "a",
    "an",
    "the",
    "one",
    "no",
    "some",
    "many",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
}


@dataclass(frozen=True, slots=True)
class Ranked:
    """A choice with its summed log-likelihood, and its share of the probability of all choices."""

    choice: str
    log_likelihood: float
    probability: float


@dataclass(frozen=True, slots=True)
class Found:
    """A picture with the log-likelihood that it gives a text, above what an even gray picture gives it."""

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
    """Load a model, with the adapter of a finished run or of an adapter folder in it.

    `model` is a hub name, a local folder, or a miniature (`tiny` is `tiny-t5`); without it the adapter's own, and
    without both the published Flan-T5-XL. UserError where one cannot be had or they do not fit each other.
    """
    run = None if adapter is None else Run(Path(adapter))
    recipe = run.recipe() if run is not None and run.recipe_file.exists() else None
    if run is not None and recipe is not None and run.state() != "finished":
        raise UserError(f"{adapter} is not finished; run the same `blipfit train` again to continue it")
    folder = None if run is None else run.adapter if recipe is not None else run.folder
    if model is not None:
        part = ModelConfig(name=grid.model_name("t5", model))
    elif recipe is not None:
        part = recipe.model
    else:
        part = ModelConfig(name=grid.MODELS["t5"] if folder is None else peft_format.base(folder))
    text, target = (
        (128, 256) if recipe is None else (recipe.training.max_text_tokens, recipe.training.max_target_tokens)
    )
    chosen = distributed.chosen(device) if isinstance(device, str | None) else device
    backbone = loading.load(part, precision, chosen, text, target)
    if folder is not None:
        peft_format.install(backbone, folder)
    return Model(backbone, None if recipe is None else recipe.data.prompt, announce)


class Model:
    """A loaded InstructBLIP; `asked` is the name of the prompt that its adapter was trained with, if any."""

    def __init__(
        self,
        backbone: Backbone,
        asked: str | None = None,
        announce: Callable[[str], None] = lambda sentence: None,
    ):
        self.backbone, self.announce = backbone, announce
        self.asked = asked or FREELY[0]
        self._store: ImageFeatures | None = None

    def ask(
        self,
        image: Picture,
        question: str,
        *,
        context: str = "",
        prompt: str | None = None,
        decoding: str | generation.Decoding = "short-answer",
    ) -> str:
        """Answer a question in the model's own words."""
        name = prompt or (self.asked if self.asked in FREELY else FREELY[0])
        (said,) = self._said([image], _prompted(name, question, context=context), decoding, 1)
        return said

    def caption(self, image: Picture, decoding: str | generation.Decoding = "caption") -> str:
        """Describe a picture in a sentence."""
        return self.captions([image], decoding)[0]

    def captions(
        self, images: Sequence[Picture], decoding: str | generation.Decoding = "caption", batch_size: int = 16
    ) -> list[str]:
        """Describe every picture in a sentence; the same sentences as one by one."""
        return self._said(images, _prompted(CAPTION), decoding, batch_size)

    @torch.no_grad()
    def rank(
        self,
        image: Picture,
        question: str,
        choices: Sequence[str],
        *,
        context: str = "",
        prompt: str | None = None,
    ) -> list[Ranked]:
        """Order the choices of a question by their log-likelihood, the likeliest first."""
        if len(choices) < 2:
            raise UserError("ranking needs two choices at least")
        made = _prompted(prompt or self.asked, question, tuple(choices), context)
        sums = self._scores(self._seen([image]), made)[0].tolist()
        total = math.log(math.fsum(math.exp(value - max(sums)) for value in sums)) + max(sums)
        ranked = [Ranked(c, value, math.exp(value - total)) for c, value in zip(choices, sums, strict=True)]
        return sorted(ranked, key=lambda one: -one.log_likelihood)

    @torch.no_grad()
    def search(
        self,
        images: str | Path | Sequence[str | Path],
        text: str,
        top: int = 9,
        batch_size: int = 32,
        advance: Callable[[int], None] = lambda done: None,
    ) -> list[Found]:
        """The pictures, of a folder and all below it or of a list, for which the text is the likeliest caption.

        What the vision tower sees is kept in the feature store, so that the next search in them is quick.
        """
        files = _files(images)
        made = Prompted(_prompted(CAPTION).prompt, text, wordings(text))
        image_features = self._stored()
        questions = [Question(str(file), file, "", "") for file in files]
        image_features.prepare(questions, advance)
        (gray,) = self._scores(self._even(), made).logsumexp(1).tolist()
        found: list[Found] = []
        for start in range(0, len(files), batch_size):
            some = files[start : start + batch_size]
            scores = self._scores(image_features.features(questions[start : start + batch_size]), made).logsumexp(1)
            found += [Found(file, score - gray) for file, score in zip(some, scores.tolist(), strict=True)]
        return sorted(found, key=lambda one: -one.score)[:top]

    # ------------------------------------------------------------- inside

    def _stored(self) -> ImageFeatures:
        if self._store is None:
            self._store = ImageFeatures.from_backbone(self.backbone, "stored", announce=self.announce)
        return self._store

    def _seen(self, images: Sequence[Picture]) -> Tensor:
        """Features `B × P × D`."""
        opened = [
            image.convert("RGB") if isinstance(image, Image.Image) else pictures.open_image(Path(image))
            for image in images
        ]
        return self.backbone.see(pictures.pixels(opened, self.backbone.image_size).to(self.backbone.device))

    def _even(self) -> Tensor:
        size = self.backbone.image_size
        return self.backbone.see(torch.zeros(1, 3, size, size, device=self.backbone.device))

    def _said(
        self, images: Sequence[Picture], made: Prompted, decoding: str | generation.Decoding, batch_size: int
    ) -> list[str]:
        chosen = generation.preset(decoding) if isinstance(decoding, str) else decoding
        encoded = self.backbone.text.encode([made]) * len(images)
        (said,) = generation.generate(
            self.backbone, encoded, lambda rows: self._seen([images[i] for i in rows]), chosen, batch_size
        )
        return said

    def _scores(self, features_BPD: Tensor, made: Prompted) -> Tensor:
        """Log-likelihoods `B × M` of the same candidates for every picture."""
        B = len(features_BPD)
        batch = self.backbone.text.candidates(self.backbone.text.encode([made]) * B).to(self.backbone.device)
        return self.backbone.score(self.backbone.query(features_BPD, batch), batch).sums_KM[0].view(B, -1)


def wordings(text: str) -> tuple[str, ...]:
    """A text as captions begin: as it is, and with an article where it has none.

    Measured on drawn pictures: people write `red star`, captions say `a red star`; the sum of both probabilities finds
    the pictures that either finds.
    """
    bare = " ".join(text.split())
    if not bare:
        raise UserError("say what to search for")
    first = bare.split()[0].lower()
    if first in _BEGUN or first[0].isdigit():
        return (bare,)
    return bare, f"{'an' if first[0] in 'aeiou' else 'a'} {bare}"


def _prompted(name: str, question: str = "", choices: tuple[str, ...] = (), context: str = "") -> Prompted:
    return prompt(name)(Question("", Path(), question, "", choices, None, context))


def _files(images: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(images, str | Path):
        return [Path(image) for image in images]
    folder = Path(images)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of pictures")
    found = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not found:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found
