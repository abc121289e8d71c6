"""Evaluates a miniature on new pictures: by ranking, by generation, in MME's wording, and without the right picture."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from blipfit.data import icons
from blipfit.data.prompts import PromptedQuestion
from blipfit.model.backbone import Backbone
from blipfit.pretraining.pretrain_vision_tower import render_pixels
from blipfit.pretraining.texts import format_multiple_choice

BATCH = 64
Picture = Literal["own", "blank", "swapped"]


@dataclass(frozen=True)
class QuestionResults:
    """Results on multiple-choice questions, one row per question."""

    skills: tuple[str, ...]
    chances: tuple[float, ...]
    right: tuple[bool, ...]

    @property
    def accuracy(self) -> float:
        """The share of right answers, 0 to 1."""
        return sum(self.right) / len(self.right)

    @property
    def chance(self) -> float:
        """The expected accuracy of guessing among the options, 0 to 1."""
        return sum(self.chances) / len(self.chances)

    def by_skill(self) -> dict[str, float]:
        """Return the accuracy on each skill."""
        rows = defaultdict(list)
        for skill, right in zip(self.skills, self.right, strict=True):
            rows[skill].append(right)
        return {skill: sum(values) / len(values) for skill, values in rows.items()}


def sample_questions(seed: int, skills: Iterable[str], count: int) -> list[tuple[icons.Scene, icons.SceneQuestion]]:
    """Return `count` questions on the pictures of a seed; the skills alternate."""
    return list(islice(icons.iterate_questions(seed, tuple(skills)), count))


@torch.no_grad()
def evaluate_questions(
    backbone: Backbone,
    questions: Sequence[tuple[icons.Scene, icons.SceneQuestion]],
    *,
    generate: bool = False,
    picture: Picture = "own",
) -> QuestionResults:
    """Answer questions by ranking, or by generation, where only the exact text is right, such as `(b) red`.

    `picture`: the question's "own", a "blank" one (uniform gray), or "swapped" with that of the next question of the
    same skill.
    """
    period = len(
        {question.skill for _, question in questions}
    )  # skills alternate: the same skill comes again after so many
    backbone.hf.eval()
    answer = _answer_by_generation if generate else _answer_by_ranking
    right: list[bool] = []
    for start in range(0, len(questions), BATCH):
        rows = questions[start : start + BATCH]
        offset = start + period if picture == "swapped" else start
        scenes = [questions[(offset + row) % len(questions)][0] for row in range(len(rows))]
        pixels = render_pixels(scenes)
        features = backbone.see(torch.zeros_like(pixels) if picture == "blank" else pixels)
        right += answer(backbone, features, [format_multiple_choice(question) for _, question in rows])
    skills = tuple(question.skill for _, question in questions)
    chances = tuple(1 / len(question.choices) for _, question in questions)
    return QuestionResults(skills, chances, tuple(right))


def _answer_by_ranking(backbone: Backbone, features: Tensor, tasks: list[PromptedQuestion]) -> list[bool]:
    batch = backbone.text.candidates(backbone.text.encode(tasks))
    scores = backbone.score_candidates(backbone.query(features, batch), batch).sums_KM[0]
    best = [int(part.argmax()) for part in scores.split([len(task.candidates) for task in tasks])]
    return [task.candidates[index] == task.target for task, index in zip(tasks, best, strict=True)]


def _answer_by_generation(backbone: Backbone, features: Tensor, tasks: list[PromptedQuestion]) -> list[bool]:
    return [text == task.target for text, task in zip(_generate(backbone, features, tasks), tasks, strict=True)]


def _generate(
    backbone: Backbone, features: Tensor, tasks: list[PromptedQuestion], max_new_tokens: int = 8
) -> list[str]:
    batch = backbone.text.prompts(backbone.text.encode(tasks))
    ids = backbone.generate(backbone.query(features, batch), batch, max_new_tokens=max_new_tokens, do_sample=False)
    return [text.strip() for text in backbone.text.llm_tokenizer.batch_decode(ids, skip_special_tokens=True)]


@torch.no_grad()
def evaluate_mme(backbone: Backbone, seed: int, pictures: int) -> dict[str, float]:
    """Return the score of each MME subtask by generation, on two questions for each of `pictures` pictures.

    The score is 100 × (share of right answers + share of pictures with two right answers), at most 200.
    """
    backbone.hf.eval()
    scores = {}
    for subtask in icons.SUBTASKS:
        pairs = list(islice(_iterate_pairs(seed, subtask), pictures))
        right: list[tuple[bool, bool]] = []
        for start in range(0, pictures, BATCH // 2):
            rows = pairs[start : start + BATCH // 2]
            features = backbone.see(render_pixels([scene for scene, _ in rows])).repeat_interleave(2, 0)
            tasks = [PromptedQuestion(text, "", ()) for _, pair in rows for text in (pair.yes, pair.no)]
            texts = [text.lower()[:4] for text in _generate(backbone, features, tasks)]
            right += [
                ("yes" in yes, "no" in no and "yes" not in no) for yes, no in zip(texts[::2], texts[1::2], strict=True)
            ]
        accuracy = sum(yes + no for yes, no in right) / (2 * pictures)
        scores[subtask] = round(100 * accuracy + 100 * sum(yes and no for yes, no in right) / pictures, 1)
    return scores


def _iterate_pairs(seed: int, subtask: str) -> Iterable[tuple[icons.Scene, icons.YesNoPair]]:
    index = 0
    while True:
        scene = icons.make_scene(seed, index)
        yield from ((scene, pair) for pair in icons.make_yes_no_pairs(scene) if pair.subtask == subtask)
        index += 1


def evaluate_miniature(backbone: Backbone, seed: int, questions: int = 1400, pictures: int = 200) -> dict[str, Any]:
    """Return all results of a finished miniature on the pictures of a seed.

    `questions` is the number of questions of the pre-trained skills; held-out skills, blank and swapped pictures get
    half as many. `pictures` is the number of pictures for each MME subtask.
    """
    known = sample_questions(seed, icons.PRETRAINED, questions)
    ranked, generated = evaluate_questions(backbone, known), evaluate_questions(backbone, known, generate=True)
    held_out = evaluate_questions(backbone, sample_questions(seed, icons.HELD_OUT, questions // 2))
    half = known[: questions // 2]
    return {
        "questions": questions,
        "chance": round(ranked.chance, 4),
        "ranked": round(ranked.accuracy, 4),
        "generated": round(generated.accuracy, 4),
        "blank": round(evaluate_questions(backbone, half, picture="blank").accuracy, 4),
        "swapped": round(evaluate_questions(backbone, half, picture="swapped").accuracy, 4),
        "held_out": round(held_out.accuracy, 4),
        "held_out_chance": round(held_out.chance, 4),
        "held_out_by_skill": {skill: round(value, 3) for skill, value in held_out.by_skill().items()},
        "by_skill": {skill: round(value, 3) for skill, value in ranked.by_skill().items()},
        "mme": evaluate_mme(backbone, seed, pictures),
    }
