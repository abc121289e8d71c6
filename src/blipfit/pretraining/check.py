"""How well a miniature answers on fresh pictures: by ranking, by generation, in MME's wording, and without seeing."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from blipfit.data import icons
from blipfit.data.prompts import Prompted
from blipfit.model.backbone import Backbone
from blipfit.pretraining import texts as pretrain_texts
from blipfit.pretraining.tower import pixels

BATCH = 64


@dataclass(frozen=True)
class SplitEvaluation:
    """Answers to multiple-choice questions: one row a question."""

    skills: tuple[str, ...]
    chances: tuple[float, ...]
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        return sum(self.right) / len(self.right)

    @property
    def chance(self) -> float:
        """What guessing among the options would score."""
        return sum(self.chances) / len(self.chances)

    def by_skill(self) -> dict[str, float]:
        """Accuracy of every skill."""
        rows = defaultdict(list)
        for skill, right in zip(self.skills, self.right, strict=True):
            rows[skill].append(right)
        return {skill: sum(found) / len(found) for skill, found in rows.items()}


def fresh(seed: int, skills: Iterable[str], number: int) -> list[tuple[icons.Scene, icons.Ask]]:
    """So many questions, the skills taking turns, on pictures of that seed."""
    return list(islice(icons.asked(seed, tuple(skills)), number))


@torch.no_grad()
def judge(
    backbone: Backbone,
    asked: Sequence[tuple[icons.Scene, icons.Ask]],
    *,
    generate: bool = False,
    see: str = "picture",
) -> SplitEvaluation:
    """Answer by ranking, or by generation (right only if the text is exactly `(b) red`).

    `see`: 'picture', 'blank' (an even gray), or 'swapped' (the picture of the next question of the same skill).
    """
    # Skills take turns: so many places further on the same skill comes again.
    turn = len({ask.skill for _, ask in asked})
    backbone.hf.eval()
    answer = _generated if generate else _ranked
    right: list[bool] = []
    for start in range(0, len(asked), BATCH):
        rows = asked[start : start + BATCH]
        shown = rows if see != "swapped" else [asked[(start + row + turn) % len(asked)] for row in range(len(rows))]
        image = pixels([scene for scene, _ in shown])
        features = backbone.see(torch.zeros_like(image) if see == "blank" else image)
        right += answer(backbone, features, [pretrain_texts.prompted(ask) for _, ask in rows])
    asks = [ask for _, ask in asked]
    return SplitEvaluation(tuple(ask.skill for ask in asks), tuple(1 / len(ask.choices) for ask in asks), tuple(right))


def _ranked(backbone: Backbone, features: Tensor, prompted: list[Prompted]) -> list[bool]:
    batch = backbone.text.candidates(backbone.text.encode(prompted))
    sums = backbone.score(backbone.query(features, batch), batch).sums_KM[0]
    best = [int(part.argmax()) for part in sums.split([len(made.candidates) for made in prompted])]
    return [made.candidates[index] == made.target for made, index in zip(prompted, best, strict=True)]


def _generated(backbone: Backbone, features: Tensor, prompted: list[Prompted]) -> list[bool]:
    return [text == made.target for text, made in zip(_texts(backbone, features, prompted), prompted, strict=True)]


def _texts(backbone: Backbone, features: Tensor, prompted: list[Prompted], tokens: int = 8) -> list[str]:
    batch = backbone.text.prompts(backbone.text.encode(prompted))
    ids = backbone.generate(backbone.query(features, batch), batch, max_new_tokens=tokens, do_sample=False)
    return [text.strip() for text in backbone.text.llm.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def mme(backbone: Backbone, seed: int, pictures: int) -> dict[str, float]:
    """The score of each subtask by generation: 100 × (right questions + pictures with both right), 200 at most."""
    backbone.hf.eval()
    scores = {}
    for subtask in icons.SUBTASKS:
        pairs = list(islice(_pairs(seed, subtask), pictures))
        both = []
        for start in range(0, pictures, BATCH // 2):
            rows = pairs[start : start + BATCH // 2]
            features = backbone.see(pixels([scene for scene, _ in rows])).repeat_interleave(2, 0)
            made = [Prompted(text, "", ()) for _, pair in rows for text in (pair.yes, pair.no)]
            texts = [text.lower()[:4] for text in _texts(backbone, features, made)]
            both += [
                ("yes" in yes, "no" in no and "yes" not in no) for yes, no in zip(texts[::2], texts[1::2], strict=True)
            ]
        single = sum(yes + no for yes, no in both) / (2 * pictures)
        scores[subtask] = round(100 * single + 100 * sum(yes and no for yes, no in both) / pictures, 1)
    return scores


def _pairs(seed: int, subtask: str) -> Iterable[tuple[icons.Scene, icons.YesNo]]:
    index = 0
    while True:
        scene = icons.scene(seed, index)
        yield from ((scene, pair) for pair in icons.yes_no(scene) if pair.subtask == subtask)
        index += 1


def measure(backbone: Backbone, seed: int, questions: int = 1400, pictures: int = 200) -> dict:
    """All that a finished miniature is judged by, on fresh pictures of `seed`, as one record."""
    known = fresh(seed, icons.PRETRAINED, questions)
    ranked, generated = judge(backbone, known), judge(backbone, known, generate=True)
    held_out = judge(backbone, fresh(seed, icons.HELD_OUT, questions // 2))
    some = known[: questions // 2]
    return {
        "questions": questions,
        "chance": round(ranked.chance, 4),
        "ranked": round(ranked.accuracy, 4),
        "generated": round(generated.accuracy, 4),
        "blank": round(judge(backbone, some, see="blank").accuracy, 4),
        "swapped": round(judge(backbone, some, see="swapped").accuracy, 4),
        "held_out": round(held_out.accuracy, 4),
        "held_out_chance": round(held_out.chance, 4),
        "held_out_by_skill": {skill: round(value, 3) for skill, value in held_out.by_skill().items()},
        "by_skill": {skill: round(value, 3) for skill, value in ranked.by_skill().items()},
        "mme": mme(backbone, seed, pictures),
    }
