"""What the miniatures are asked in pre-training, drawn anew for every picture."""

import random
from dataclasses import dataclass, replace

from blipfit.data import icons
from blipfit.data.icons.scene import LAST_MARK
from blipfit.data.icons.skills import PLACES, TIMES, plural
from blipfit.data.prompts import PROMPTS, Prompted
from blipfit.model.tiny_tokenizers import COMMON_WORDS
from blipfit.pretraining import texts as pretrain_texts
from blipfit.pretraining.texts import as_question

ANSWERS = (
    *icons.COLORS,
    *icons.SHAPES,
    *map(plural, icons.SHAPES),
    *map(str, range(LAST_MARK + 1)),
    *("yes", "no", "left", "right", "above", "below", "big", "small"),
    *PLACES,
    *TIMES,
)
HELD_OUT_WORDS = set("first second third fourth from next come comes different other others more fewer most".split())  # noqa: SIM905
OTHER_WORDS = [word for word in COMMON_WORDS if word not in HELD_OUT_WORDS]
WORDS = [*ANSWERS, *ANSWERS, *OTHER_WORDS]
SINGULAR = {name: shape for shape in icons.SHAPES for name in (shape, plural(shape))}
CAPTION = PROMPTS["caption-v1"](as_question("", "")).prompt


@dataclass(frozen=True)
class Mixture:
    """How often what is asked: weights of the draw among all that a picture allows, without replacement."""

    asks: int = 4
    """Tasks a picture."""
    skills: tuple[str, ...] = icons.PRETRAINED
    plans: tuple[str, ...] = ()
    """Plans of every other picture, in turn; without any, all pictures are drawn as they come."""
    options: float = 0.7
    """Share of the questions that come with options; the rest is answered freely."""
    yes_no: float = 0.6
    counts: float = 1.0
    """Of the yes/no pairs, how often those about a count: times `yes_no`."""
    caption: float = 0.8
    heads: float = 0.5
    """Weight of the Q-Former's heads beside the language model's loss."""
    named: float = 0.0
    """Weight of a third head: which cells hold the first, and which the second thing that the question names."""
    blank: float = 0.0
    """Share of the questions with options that are asked of an empty picture; any option is then the answer."""
    misread: float = 0.0
    """Share of the questions that the Q-Former reads as they are and the language model as random words before the
    options: it learns to take the answer from the visual tokens, whatever is asked."""
    lookups: int = 0
    """Questions a step, without a picture and for the language model alone, that name the right option themselves:
    they teach which letter belongs to a known answer."""
    hard: float = 2.5
    """Weight of the skills below; the others weigh 1."""
    hard_skills: tuple[str, ...] = ("count_all", "count_kind", "relation", "where", "beside", "time", "scale")


def drawn(seed: int, first: int, number: int, mixture: Mixture) -> list[icons.Scene]:
    """So many scenes of that seed, from scene `first` on."""
    plans = mixture.plans
    return [
        icons.scene(seed, index, plan=plans[index // 2 % len(plans)] if plans and index % 2 else None)
        for index in range(first, first + number)
    ]


def tasks(scene: icons.Scene, mixture: Mixture, rng: random.Random) -> list[Prompted]:
    """At most `mixture.asks` things to be said about a picture."""
    pool: list[tuple[float, Prompted]] = []
    for ask in icons.questions(scene, mixture.skills):
        question = as_question(ask.question, ask.answer, ask.choices, ask.answer_index)
        freely = PROMPTS["vqa-v1"](as_question(ask.question, ask.answer))
        made = PROMPTS["iconqa-v1"](question) if rng.random() < mixture.options else freely
        pool.append((mixture.hard if ask.skill in mixture.hard_skills else 1.0, made))
    for pair in icons.yes_no(scene):
        yes = rng.random() < 0.5
        weight = mixture.yes_no * (mixture.counts if pair.subtask == "count" else 1)
        pool.append((weight, Prompted(pair.yes if yes else pair.no, "Yes" if yes else "No", ())))
    told = pretrain_texts.caption(scene, rng)
    pool.append((mixture.caption, PROMPTS["caption-v1"](as_question("", told))))
    return _drawn([item for item in pool if item[0] > 0], mixture.asks, rng)


def named_things(prompt: str) -> list[tuple[str, str]]:
    """The (color, shape) pairs that a question names, in order, '' where it leaves one open; options do not count.

    'Is the red star left or right of the heart?' → [('red', 'star'), ('', 'heart')].
    """
    words = [word.strip("?.,;") for word in prompt.split("Options:")[0].split()]
    things, color = [], ""
    for word in [*words, ""]:
        shape = SINGULAR.get(word, "")
        if color or shape:
            things.append((color, shape))
        color = word if word in icons.COLORS else ""
    return things


def lookups(number: int, rng: random.Random) -> list[Prompted]:
    """Questions like 'Which option is red?' over options of every sort; no word of a held-out skill is among them."""
    made = []
    for _ in range(number):
        choices = list(dict.fromkeys(rng.sample(WORDS, rng.randint(2, 5))))
        at = rng.randrange(len(choices))
        question = rng.choice(("Which option is {}?", "Choose {}.", "{}?")).format(choices[at])
        made.append(PROMPTS["iconqa-v1"](as_question(question, choices[at], choices, at)))
    return made


def misread(made: Prompted, rng: random.Random) -> Prompted:
    """The same prompt with other words for the question; one without a question comes back as it is."""
    before, asked, rest = made.prompt.partition("Question: ")
    if not asked:
        return made
    kept = rest[rest.index("Options:") :] if "Options:" in rest else "Short answer:"
    words = " ".join(rng.choices(OTHER_WORDS, k=rng.randint(3, 10)))
    return replace(made, prompt=f"{before}{asked}{words}? {kept}")


def emptied(made: Prompted, rng: random.Random) -> Prompted:
    """The same question where nothing can be seen: one option is as good an answer as another."""
    return replace(made, target=rng.choice(made.candidates))


def _drawn(pool: list[tuple[float, Prompted]], number: int, rng: random.Random) -> list[Prompted]:
    """A weighted draw without replacement: the largest u^(1/weight)."""
    keyed = sorted(pool, key=lambda item: -(rng.random() ** (1 / item[0])))
    return [made for _, made in keyed[:number]]
