"""What the miniatures are asked in pre-training, drawn anew for every picture."""

import random
from dataclasses import dataclass

from blipfit.data import icons
from blipfit.data.prompts import PROMPTS, Prompted
from blipfit.training import pretrain_texts
from blipfit.training.pretrain_texts import as_question

CAPTION = PROMPTS["caption-v1"](as_question("", "")).prompt


@dataclass(frozen=True)
class Mixture:
    """How often what is asked: weights of the draw among all that a picture allows, without replacement."""

    asks: int = 4
    """Tasks a picture."""
    options: float = 0.7
    """Share of the questions that come with options; the rest is answered freely."""
    yes_no: float = 0.6
    caption: float = 0.8
    heads: float = 0.5
    """Weight of the Q-Former's heads beside the language model's loss."""
    hard: float = 2.5
    """Weight of the skills below; the others weigh 1."""
    hard_skills: tuple[str, ...] = ("count_all", "count_kind", "relation", "where", "beside", "time", "scale")


def tasks(scene: icons.Scene, mixture: Mixture, rng: random.Random) -> list[Prompted]:
    """At most `mixture.asks` things to be said about a picture."""
    pool: list[tuple[float, Prompted]] = []
    for ask in icons.questions(scene, icons.PRETRAINED):
        question = as_question(ask.question, ask.answer, ask.choices, ask.answer_index)
        freely = PROMPTS["vqa-v1"](as_question(ask.question, ask.answer))
        made = PROMPTS["iconqa-v1"](question) if rng.random() < mixture.options else freely
        pool.append((mixture.hard if ask.skill in mixture.hard_skills else 1.0, made))
    for pair in icons.yes_no(scene):
        yes = rng.random() < 0.5
        pool.append((mixture.yes_no, Prompted(pair.yes if yes else pair.no, "Yes" if yes else "No", ())))
    told = pretrain_texts.caption(scene, rng)
    pool.append((mixture.caption, PROMPTS["caption-v1"](as_question("", told))))
    return _drawn(pool, mixture.asks, rng)


def _drawn(pool: list[tuple[float, Prompted]], number: int, rng: random.Random) -> list[Prompted]:
    """A weighted draw without replacement: the largest u^(1/weight)."""
    keyed = sorted(pool, key=lambda item: -(rng.random() ** (1 / item[0])))
    return [made for _, made in keyed[:number]]
