"""One split of a data set, ready for the model: questions with their prompts and token ids."""

from dataclasses import dataclass
from pathlib import Path

from blipfit import data as blipfit_data
from blipfit.data.batches import EncodedQuestion, TextEncoder
from blipfit.data.prompts import PromptedQuestion, get_prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.recipe import DataConfig


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """The questions of a split with their prompts and token ids: three lists of equal length and order."""

    questions: list[Question]
    prompted: list[PromptedQuestion]
    encoded: list[EncodedQuestion]

    def __len__(self) -> int:
        return len(self.questions)

    @property
    def lengths(self) -> list[int]:
        """Number of text tokens of every question in training: truncated prompt plus target."""
        return [len(question.training_prompt) + len(question.target) for question in self.encoded]

    def longest(self, count: int) -> "EncodedSplit":
        """Return the `count` questions with the longest prompts, longest first; all if there are fewer."""
        rows = sorted(range(len(self)), key=lambda row: -len(self.encoded[row].evaluation_prompt))[:count]
        return EncodedSplit(
            questions=[self.questions[row] for row in rows],
            prompted=[self.prompted[row] for row in rows],
            encoded=[self.encoded[row] for row in rows],
        )


def load(text: TextEncoder, config: DataConfig, folder: Path, split: str) -> EncodedSplit:
    """Load a split of a data set, write the prompts and tokenize them.

    Raises UserError if the data cannot be read, or if a question's answer is not among its choices.
    """
    questions = blipfit_data.load(config.name, folder, split, config.limit)
    write_prompt = get_prompt(config.prompt)
    prompted = [write_prompt(question) for question in questions]
    for question, texts in zip(questions, prompted, strict=True):
        if texts.candidates and texts.target not in texts.candidates:
            raise UserError(
                f"{config.name} {split} {question.id}: the answer {texts.target!r} is not among the choices"
            )
    return EncodedSplit(questions, prompted, text.encode(prompted))
