"""What a model is trained and evaluated on: questions with their prompts and tokens."""

from dataclasses import dataclass
from pathlib import Path

from blipfit import data as datasets
from blipfit.data.batches import Encoded, TextEncoder
from blipfit.data.prompts import Prompted, prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.recipe import DataConfig


@dataclass(frozen=True, slots=True)
class EncodedSplit:
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

    def longest(self, count: int) -> "EncodedSplit":
        """The `count` questions with the longest prompts, or all."""
        rows = sorted(range(len(self)), key=lambda i: -len(self.encoded[i].prompt))[:count]
        return EncodedSplit(*([column[i] for i in rows] for column in (self.questions, self.prompted, self.encoded)))  # type: ignore[arg-type]


def load(text: TextEncoder, config: DataConfig, folder: Path, split: str) -> EncodedSplit:
    """Load a split of a data set, write its prompts, tokenize them."""
    questions = datasets.load(config.name, folder, split, config.limit)
    prompted = [prompt(config.prompt)(question) for question in questions]
    for question, written in zip(questions, prompted, strict=True):
        if written.candidates and written.target not in written.candidates:
            raise UserError(
                f"{config.name} {split} {question.id}: the answer {written.target!r} is not among the choices"
            )
    return EncodedSplit(questions, prompted, text.encode(prompted))
