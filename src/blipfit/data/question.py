"""The record that every data set is loaded into."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

SPLITS = ("train", "val", "test")

Transparency = Literal["white", "dropped"]
"""What replaces transparency: a white background, or nothing (colors as stored), as in the published experiments."""


@dataclass(frozen=True, slots=True)
class Question:
    """One image with a question and its answer.

    `answer` is the text of the correct answer. With `choices`, `answer == choices[answer_index]`; an open question has
    no choices and no index. `tags` (subject, grade, skill, …) group results; the model never sees them.
    `transparency` says how transparent pixels of the image are shown: on white, or dropped as in the published
    experiments.
    """

    id: str
    image: Path
    question: str
    answer: str
    choices: tuple[str, ...] = ()
    answer_index: int | None = None
    context: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    transparency: Transparency = "white"
