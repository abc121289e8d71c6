"""What the miniatures read and write in pre-training: prompts and targets of the icon world, planted errors."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from blipfit.data import icons
from blipfit.data.icons.skills import TIMES, plural
from blipfit.data.icons.words import NUMBERS
from blipfit.data.prompts import PROMPTS, Prompted, iconqa_v1
from blipfit.data.question import Question

# One word may stand for another of its family; the result is another description of the same length.
WORD_FAMILIES: tuple[tuple[str, ...], ...] = (
    icons.COLORS,
    icons.SHAPES,
    tuple(plural(shape) for shape in icons.SHAPES),
    NUMBERS[2:7],
    tuple(str(mark) for mark in range(11)),
    TIMES,
    ("left", "right"),
    ("top", "bottom"),
    ("above", "below"),
    ("big", "small"),
)


def as_question(text: str, answer: str, choices: Sequence[str] = (), index: int | None = None) -> Question:
    """A question without a picture's file: here pictures are drawn, not read."""
    return Question("", Path(), text, answer, tuple(choices), index)


def prompted(ask: icons.Ask) -> Prompted:
    """A multiple-choice question in the very prompt of fine-tuning and testing, `iconqa-v1`."""
    return iconqa_v1(as_question(ask.question, ask.answer, ask.choices, ask.answer_index))


def spelled(scene: icons.Scene, skills: Sequence[str] = tuple(icons.SKILLS)) -> Iterator[str]:
    """Every text about a scene: what a tokenizer must know."""
    for ask in icons.questions(scene, skills):
        question = as_question(ask.question, ask.answer, ask.choices, ask.answer_index)
        for name in ("iconqa-v1", "vqa-v1", "scienceqa-v1"):
            made = PROMPTS[name](question)
            yield from (made.prompt, made.target)
    yield from icons.captions(scene)
    yield PROMPTS["caption-v1"](as_question("", "")).prompt
    for pair in icons.yes_no(scene):
        yield from (pair.yes, pair.no, "Yes", "No", "yes", "no")
    if told := icons.preference(scene):
        yield from (told.query, told.good, told.bad)


def fullest(scene: icons.Scene, words: int = 24) -> str:
    """The caption that tells most of the picture in at most so many words."""
    told = icons.captions(scene)
    return next((text for text in reversed(told) if len(text.split()) <= words), told[0])


def caption(scene: icons.Scene, rng: random.Random) -> str:
    """One true caption: mostly the fullest one, which fits hardly any other picture."""
    return fullest(scene) if rng.random() < 0.6 else rng.choice([fullest(scene), *icons.captions(scene)[:-1]])


def planted(text: str, rng: random.Random) -> str:
    """The same text with one word replaced by another of its family: almost always no longer true.

    A text without such a word comes back unchanged.
    """
    words = text.split(" ")
    places = [
        (place, family) for place, word in enumerate(words) for family in WORD_FAMILIES if word.strip(",;.") in family
    ]
    if not places:
        return text
    place, family = rng.choice(places)
    word = words[place].strip(",;.")
    other = rng.choice([name for name in family if name != word])
    return " ".join([*words[:place], words[place].replace(word, other), *words[place + 1 :]])
