"""The one record that every data set is read into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

SPLITS = ("train", "val", "test")


@dataclass(frozen=True, slots=True)
class Question:
    """One image with a question and its answer.

    `answer` is the text of the right answer. Where there are `choices`, `answer == choices[answer_index]`;
    an open question has no choices and no index. `tags` (subject, grade, skill, …) only serve to break a
    result down; nothing in them reaches the model.
    """

    id: str
    image: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    answer_index: int | None = None
    context: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
