"""What a model is trained and judged on: questions with their prompts, tokens and image features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from blipfit import data as datasets
from blipfit.data import images
from blipfit.data.batches import Encoded
from blipfit.data.prompts import Prompted, prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.model.backbone import Backbone
from blipfit.recipe import DataPart


@dataclass(frozen=True, slots=True)
class Material:
    """One split, ready for the three stages."""

    questions: list[Question]
    prompted: list[Prompted]
    encoded: list[Encoded]

    def __len__(self) -> int:
        return len(self.questions)


def read(backbone: Backbone, part: DataPart, folder: Path, split: str) -> Material:
    """Load a split of a data set, write its prompts, tokenise them."""
    questions = datasets.load(part.name, folder, split, part.limit)
    prompted = [prompt(part.prompt)(question) for question in questions]
    for question, written in zip(questions, prompted, strict=True):
        if written.candidates and written.target not in written.candidates:
            raise UserError(
                f"{part.name} {split} {question.id}: the answer {written.target!r} is not among the choices"
            )
    return Material(questions, prompted, backbone.text.encode(prompted))


class Eyes:
    """Image features of questions: opens, resizes or augments, and sees."""

    def __init__(self, backbone: Backbone):
        self.backbone = backbone

    def pixels(self, questions: Sequence[Question], view: tuple[int, int] | None = None) -> Tensor:
        """`B × 3 × S × S`; `view` = (seed, epoch) of the augmentation, or None for the plain resize."""
        size = self.backbone.image_size
        opened = [images.open_image(question.image) for question in questions]
        if view is not None:
            seed, epoch = view
            opened = [
                images.augment(image, seed=seed, epoch=epoch, image_id=question.id, size=size)
                for image, question in zip(opened, questions, strict=True)
            ]
        return images.pixels(opened, size)

    def see(self, pixels: Tensor) -> Tensor:
        """`B × P × D` image features before the trained layer norm."""
        return self.backbone.see(pixels.to(self.backbone.device, non_blocking=True))

    def plain(self, questions: Sequence[Question]) -> Tensor:
        return self.see(self.pixels(questions))
