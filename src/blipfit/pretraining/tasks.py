"""Samples the pictures of a training step, and the tasks that the miniatures get about each picture."""

import random
from dataclasses import dataclass, replace

from blipfit.data import icons
from blipfit.data.icons.scene import LAST_MARK
from blipfit.data.icons.scene_words import QUARTERS, TIMES, pluralize
from blipfit.data.prompts import PROMPTS, PromptedQuestion
from blipfit.model.tiny_tokenizers import COMMON_WORDS
from blipfit.pretraining.texts import build_question, format_multiple_choice, sample_caption

ANSWERS = (
    *icons.COLORS,
    *icons.SHAPES,
    *map(pluralize, icons.SHAPES),
    *map(str, range(LAST_MARK + 1)),
    *("yes", "no", "left", "right", "above", "below", "big", "small"),
    *QUARTERS,
    *TIMES,
)
# Words of the kinds of questions that fine-tuning shall teach; pre-training must not use them.
HELD_OUT_WORDS = set("first second third fourth from next come comes different other others more fewer most".split())  # noqa: SIM905
OTHER_WORDS = [word for word in COMMON_WORDS if word not in HELD_OUT_WORDS]
WORDS = [*ANSWERS, *ANSWERS, *OTHER_WORDS]
SINGULAR = {name: shape for shape in icons.SHAPES for name in (shape, pluralize(shape))}
CAPTION_PROMPT = PROMPTS["caption-v1"](build_question("", "")).prompt


@dataclass(frozen=True)
class Mixture:
    """Which tasks a stage samples for each picture, and how often.

    A weight is that of a task in the sampling without replacement among all tasks that the picture allows.
    """

    tasks_per_picture: int = 4
    skills: tuple[str, ...] = icons.PRETRAINED
    plans: tuple[str, ...] = ()
    """Scene plans of every other picture, in turn; the rest, or all pictures if empty, have a random plan."""
    options_share: float = 0.7
    """Share of the questions that list their options; the others are open questions."""
    yes_no_weight: float = 0.6
    count_factor: float = 1.0
    """Factor on `yes_no_weight` for the yes/no questions about a count."""
    caption_weight: float = 0.8
    heads_loss_weight: float = 0.5
    """Weight of the losses of the Q-Former's heads beside the language model's loss."""
    named_loss_weight: float = 0.0
    """Weight of the loss of the head that marks the cells of the things that the question names."""
    blank_share: float = 0.0
    """Share of the questions with options that get a blank picture and a random option as the target."""
    random_text_share: float = 0.0
    """Share of the questions that the language model reads with random words in place of the question.

    The Q-Former reads the question itself, so the language model learns to take the answer from the visual tokens.
    """
    lookups_per_step: int = 0
    """Text-only questions per step that name the right option; they teach which letter belongs to an answer."""
    hard_weight: float = 2.5
    """Weight of the skills in `hard_skills`; other skills have weight 1."""
    hard_skills: tuple[str, ...] = ("count_all", "count_kind", "relation", "where", "beside", "time", "scale")


def sample_scenes(seed: int, first: int, count: int, mixture: Mixture) -> list[icons.Scene]:
    """Return the scenes `first` to `first + count - 1` of a seed, with the mixture's plans."""
    plans = mixture.plans
    return [
        icons.make_scene(seed, index, plan=plans[index // 2 % len(plans)] if plans and index % 2 else None)
        for index in range(first, first + count)
    ]


def sample_tasks(scene: icons.Scene, mixture: Mixture, rng: random.Random) -> list[PromptedQuestion]:
    """Sample at most `mixture.tasks_per_picture` prompts about a scene, each with its target."""
    pool: list[tuple[float, PromptedQuestion]] = []
    for question in icons.make_questions(scene, mixture.skills):
        open_task = PROMPTS["vqa-v1"](build_question(question.question, question.answer))
        task = format_multiple_choice(question) if rng.random() < mixture.options_share else open_task
        pool.append((mixture.hard_weight if question.skill in mixture.hard_skills else 1.0, task))
    for pair in icons.make_yes_no_pairs(scene):
        yes = rng.random() < 0.5
        weight = mixture.yes_no_weight * (mixture.count_factor if pair.subtask == "count" else 1)
        pool.append((weight, PromptedQuestion(pair.yes if yes else pair.no, "Yes" if yes else "No", ())))
    caption = sample_caption(scene, rng)
    pool.append((mixture.caption_weight, PROMPTS["caption-v1"](build_question("", caption))))
    return _sample_weighted([item for item in pool if item[0] > 0], mixture.tasks_per_picture, rng)


def find_named_things(prompt: str) -> list[tuple[str, str]]:
    """Return the (color, shape) pairs that a question names, in order, with '' for what it does not name.

    Options are not read. 'Is the red star left or right of the heart?' → [('red', 'star'), ('', 'heart')].
    """
    words = [word.strip("?.,;") for word in prompt.split("Options:")[0].split()]
    things, color = [], ""
    for word in [*words, ""]:
        shape = SINGULAR.get(word, "")
        if color or shape:
            things.append((color, shape))
        color = word if word in icons.COLORS else ""
    return things


def sample_lookups(count: int, rng: random.Random) -> list[PromptedQuestion]:
    """Sample questions like 'Which option is red?', whose options contain no word of a held-out skill."""
    lookups = []
    for _ in range(count):
        choices = list(dict.fromkeys(rng.sample(WORDS, rng.randint(2, 5))))
        answer_index = rng.randrange(len(choices))
        answer = choices[answer_index]
        question = rng.choice(("Which option is {}?", "Choose {}.", "{}?")).format(answer)
        lookups.append(PROMPTS["iconqa-v1"](build_question(question, answer, choices, answer_index)))
    return lookups


def replace_question(task: PromptedQuestion, rng: random.Random) -> PromptedQuestion:
    """Replace the question in a prompt by random words; a prompt without a question is returned unchanged."""
    before, marker, rest = task.prompt.partition("Question: ")
    if not marker:
        return task
    after = rest[rest.index("Options:") :] if "Options:" in rest else "Short answer:"
    words = " ".join(rng.choices(OTHER_WORDS, k=rng.randint(3, 10)))
    return replace(task, prompt=f"{before}{marker}{words}? {after}")


def randomize_target(task: PromptedQuestion, rng: random.Random) -> PromptedQuestion:
    """Take a random option as the target, because no option is better than another on a blank picture."""
    return replace(task, target=rng.choice(task.candidates))


def _sample_weighted(
    pool: list[tuple[float, PromptedQuestion]], count: int, rng: random.Random
) -> list[PromptedQuestion]:
    """Sample tasks by weight without replacement: those with the largest u^(1/weight), u uniform in [0, 1)."""
    ordered = sorted(pool, key=lambda item: -(rng.random() ** (1 / item[0])))
    return [task for _, task in ordered[:count]]
