"""The record that every data set is loaded into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """One image with a question and its answer.

    `answer` is the text of the correct answer. With `choices`, `answer == choices[answer_index]`; an open question has
    no choices and no index. `tags` (subject, grade, skill, …) group results; the model never sees them.
    """

    id: str
    image: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    answer_index: int | None = None
    context: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
