"""What a model is trained and judged on: questions with their prompts and tokens."""

from dataclasses import dataclass
from pathlib import Path

from blipfit import data as datasets
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

    @property
    def lengths(self) -> list[int]:
        """Text tokens of every question in training: its cut prompt and its answer."""
        return [len(one.prompt_cut) + len(one.target) for one in self.encoded]

    def longest(self, count: int) -> "Material":
        """The `count` questions with the longest prompts, or all."""
        rows = sorted(range(len(self)), key=lambda i: -len(self.encoded[i].prompt))[:count]
        return Material(*([column[i] for i in rows] for column in (self.questions, self.prompted, self.encoded)))  # type: ignore[arg-type]


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
