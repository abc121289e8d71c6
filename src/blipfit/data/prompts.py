"""Prompts by name and version: from a question to the text a model reads and the text it should give.

A prompt decides results, so one that changes gets a new version beside the old one and is never edited.
"""

import difflib
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from blipfit.data.question import Question
from blipfit.errors import UserError

LETTERS = string.ascii_lowercase
_REMOVED = str.maketrans("", "", "!*#;")


@dataclass(frozen=True, slots=True)
class Prompted:
    """A question as text: what is read, the right answer, and all answers to rank (none if it is open)."""

    prompt: str
    target: str
    candidates: tuple[str, ...]


def options(choices: Sequence[str]) -> tuple[str, ...]:
    """Return the choices with their letters: `(a) X`, `(b) Y`, …; at most 26."""
    assert len(choices) <= len(LETTERS), "readers of data refuse more choices than letters"
    return tuple(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def clean(prompt: str) -> str:
    """Remove `! * # ;` and trailing blanks, as the published experiments did to prompts, never to answers."""
    return prompt.translate(_REMOVED).rstrip(" ")


def scienceqa_v1(question: Question) -> Prompted:
    """The published ScienceQA prompt.

    `Context: {…} Question: {…} Options: {(a) X\\n(b) Y\\n} Answer:` — the braces are literal characters and
    every option, the last one too, ends in a newline. The context is hint + blank + lecture, so it begins
    with a blank where there is no hint.
    """
    lines = "".join(f"{option}\n" for option in options(question.choices))
    text = f"Context: {{{question.context}}} Question: {{{question.question}}} Options: {{{lines}}} Answer:"
    return _prompted(text, question)


def iconqa_v1(question: Question) -> Prompted:
    """The published IconQA prompt: `<Image> Question: … Options: (a) X (b) Y. Short answer:`.

    `<Image>` is seven plain characters of text here, not a place for visual tokens.
    """
    listed = " ".join(options(question.choices))
    return _prompted(f"<Image> Question: {question.question} Options: {listed}. Short answer:", question)


def vqa_v1(question: Question) -> Prompted:
    """The prompt for own data: `Context: … Question: … Options: (a) X (b) Y. Short answer:`.

    InstructBLIP's own template for short answers; context and options only where the question has them.
    """
    context = f"Context: {question.context.strip()} " if question.context.strip() else ""
    listed = f" Options: {' '.join(options(question.choices))}." if question.choices else ""
    return _prompted(f"{context}Question: {question.question}{listed} Short answer:", question)


def caption_v1(question: Question) -> Prompted:
    """The published caption prompt; it does not read the question."""
    return _prompted("<Image> A short image description:", question)


def instruction_v1(question: Question) -> Prompted:
    """The question itself, for sets whose questions are whole instructions; choices are not listed."""
    return _prompted(question.question, question)


PROMPTS: dict[str, Callable[[Question], Prompted]] = {
    "scienceqa-v1": scienceqa_v1,
    "iconqa-v1": iconqa_v1,
    "vqa-v1": vqa_v1,
    "caption-v1": caption_v1,
    "instruction-v1": instruction_v1,
}


def prompt(name: str) -> Callable[[Question], Prompted]:
    """Return the prompt of that name."""
    if name not in PROMPTS:
        near = difflib.get_close_matches(name, PROMPTS, n=1, cutoff=0.5)
        mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(PROMPTS)}"
        raise UserError(f"unknown prompt {name!r}; {mend}")
    return PROMPTS[name]


def _prompted(text: str, question: Question) -> Prompted:
    candidates = options(question.choices)
    target = question.answer if question.answer_index is None else candidates[question.answer_index]
    return Prompted(clean(text), target, candidates)
