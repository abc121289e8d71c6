"""The texts of pre-training, made from a picture's scene: prompts with their answers, captions, and false captions."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from blipfit.data import icons
from blipfit.data.icons.scene_words import TIMES, pluralize
from blipfit.data.icons.statements import NUMBERS
from blipfit.data.prompts import PROMPTS, PromptedQuestion, iconqa_v1
from blipfit.data.question import Question

# A word may be replaced by another of its family; the result describes another picture in as many words.
WORD_FAMILIES: tuple[tuple[str, ...], ...] = (
    icons.COLORS,
    icons.SHAPES,
    tuple(pluralize(shape) for shape in icons.SHAPES),
    NUMBERS[2:7],
    tuple(str(mark) for mark in range(11)),
    TIMES,
    ("left", "right"),
    ("top", "bottom"),
    ("above", "below"),
    ("big", "small"),
)


def build_question(text: str, answer: str, choices: Sequence[str] = (), answer_index: int | None = None) -> Question:
    """Build a question without an image file, because pre-training renders its pictures in memory."""
    return Question("", Path(), text, answer, tuple(choices), answer_index)


def format_multiple_choice(question: icons.SceneQuestion) -> PromptedQuestion:
    """Format a multiple-choice question in the prompt of fine-tuning and testing, `iconqa-v1`."""
    return iconqa_v1(build_question(question.question, question.answer, question.choices, question.answer_index))


def iterate_texts(scene: icons.Scene, skills: Sequence[str] = tuple(icons.SKILLS)) -> Iterator[str]:
    """Yield every text that can be written about a scene: what the tokenizers are trained on."""
    for item in icons.make_questions(scene, skills):
        question = build_question(item.question, item.answer, item.choices, item.answer_index)
        for prompt_name in ("iconqa-v1", "vqa-v1", "scienceqa-v1"):
            prompted = PROMPTS[prompt_name](question)
            yield from (prompted.prompt, prompted.target)
    yield from icons.make_captions(scene)
    yield PROMPTS["caption-v1"](build_question("", "")).prompt
    for pair in icons.make_yes_no_pairs(scene):
        yield from (pair.yes, pair.no, "Yes", "No", "yes", "no")
    if preference := icons.make_preference(scene):
        yield from (preference.query, preference.good, preference.bad)


def select_detailed_caption(scene: icons.Scene, max_words: int = 24) -> str:
    """Return the most detailed caption of at most `max_words` words, or the shortest caption if all are longer."""
    captions = icons.make_captions(scene)
    return next((text for text in reversed(captions) if len(text.split()) <= max_words), captions[0])


def sample_caption(scene: icons.Scene, rng: random.Random) -> str:
    """Sample a true caption; mostly the most detailed one, which describes hardly any other picture."""
    detailed = select_detailed_caption(scene)
    return detailed if rng.random() < 0.6 else rng.choice([detailed, *icons.make_captions(scene)[:-1]])


def corrupt_text(text: str, rng: random.Random) -> str:
    """Replace one word of a text by another word of its family, so that the text is almost always false.

    A text without such a word is returned unchanged.
    """
    words = text.split(" ")
    replaceable = [
        (index, family) for index, word in enumerate(words) for family in WORD_FAMILIES if word.strip(",;.") in family
    ]
    if not replaceable:
        return text
    index, family = rng.choice(replaceable)
    word = words[index].strip(",;.")
    replacement = rng.choice([name for name in family if name != word])
    return " ".join([*words[:index], words[index].replace(word, replacement), *words[index + 1 :]])
