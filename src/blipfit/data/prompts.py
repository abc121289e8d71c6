"""Prompt templates by name and version: they turn a question into the model's input text and its target text.

A prompt changes results. Never edit an existing template: add a new version beside it.
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
class PromptedQuestion:
    """A question as text."""

    prompt: str
    """What the model reads."""
    target: str
    """The correct answer."""
    candidates: tuple[str, ...]
    """All answers to rank; empty for an open question."""


def format_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """Return the choices with their letters, `(a) X`, `(b) Y`, …; raises UserError if there are more than 26."""
    if len(choices) > len(LETTERS):
        raise UserError(f"{len(choices)} choices: at most {len(LETTERS)} can be lettered (a to z); give fewer choices")
    return tuple(f"({letter}) {choice}" for letter, choice in zip(LETTERS, choices, strict=False))


def clean_prompt(prompt: str) -> str:
    """Remove `! * # ;` and trailing spaces, as the published experiments did with prompts (but not with answers)."""
    return prompt.translate(_REMOVED).rstrip(" ")


def scienceqa_v1(question: Question) -> PromptedQuestion:
    """Write the published ScienceQA prompt.

    `Context: {…} Question: {…} Options: {(a) X\\n(b) Y\\n} Answer:`. The braces are literal characters, and every
    option ends with a newline, also the last. The context is hint + space + lecture, so without a hint it starts with
    a space.
    """
    lines = "".join(f"{option}\n" for option in format_choices(question.choices))
    text = f"Context: {{{question.context}}} Question: {{{question.question}}} Options: {{{lines}}} Answer:"
    return _with_answers(text, question)


def iconqa_v1(question: Question) -> PromptedQuestion:
    """Write the published IconQA prompt: `<Image> Question: … Options: (a) X (b) Y. Short answer:`.

    `<Image>` is plain text here, not a placeholder for visual tokens.
    """
    options = " ".join(format_choices(question.choices))
    return _with_answers(f"<Image> Question: {question.question} Options: {options}. Short answer:", question)


def vqa_v1(question: Question) -> PromptedQuestion:
    """Write the prompt for own data: `Context: … Question: … Options: (a) X (b) Y. Short answer:`.

    It is InstructBLIP's template for short answers; context and options are left out if the question has none.
    """
    context = f"Context: {question.context.strip()} " if question.context.strip() else ""
    options = f" Options: {' '.join(format_choices(question.choices))}." if question.choices else ""
    return _with_answers(f"{context}Question: {question.question}{options} Short answer:", question)


def caption_v1(question: Question) -> PromptedQuestion:
    """Write the published caption prompt, which ignores the question."""
    return _with_answers("<Image> A short image description:", question)


def instruction_v1(question: Question) -> PromptedQuestion:
    """Use the question itself as the prompt, for data sets whose questions are complete instructions."""
    return _with_answers(question.question, question)


PROMPTS: dict[str, Callable[[Question], PromptedQuestion]] = {
    "scienceqa-v1": scienceqa_v1,
    "iconqa-v1": iconqa_v1,
    "vqa-v1": vqa_v1,
    "caption-v1": caption_v1,
    "instruction-v1": instruction_v1,
}


def get_prompt(name: str) -> Callable[[Question], PromptedQuestion]:
    """Return the function that turns a question into the prompt `name`; raises UserError if the name is unknown.

    The returned function raises UserError if a question has more than 26 choices.
    """
    if name not in PROMPTS:
        similar = difflib.get_close_matches(name, PROMPTS, n=1, cutoff=0.5)
        fix = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(PROMPTS)}"
        raise UserError(f"unknown prompt {name!r}; {fix}")
    return PROMPTS[name]


def _with_answers(text: str, question: Question) -> PromptedQuestion:
    """Clean the prompt and add the target and the candidates of the question."""
    candidates = format_choices(question.choices)
    target = question.answer if question.answer_index is None else candidates[question.answer_index]
    return PromptedQuestion(clean_prompt(text), target, candidates)
