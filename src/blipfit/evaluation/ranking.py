"""Judging by ranking: the candidate with the highest summed log-likelihood is the answer.

Source: the original experiments. The score is the SUM over a candidate's tokens (T5's end token included, Vicuna's
not), not normalized by length; the mean is reported beside it. An answer is right if its text equals the labelled
option's, to the letter.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfit.data.batches import Encoded
from blipfit.data.prompts import Prompted
from blipfit.evaluation.metrics import accuracy, breakdown
from blipfit.model.backbone import Backbone
from blipfit.runtime import distributed

MOST_ROWS = 512
"""Candidates of all experiments in one forward pass: a large bank ranks fewer questions at once, not more memory."""


@dataclass(frozen=True, slots=True)
class Choice:
    """One judged question: every candidate's score and what they choose."""

    sums: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def means(self) -> tuple[float, ...]:
        return tuple(s / n for s, n in zip(self.sums, self.lengths, strict=True))

    @property
    def finite(self) -> bool:
        """Whether all scores are numbers; a model with a broken weight gives none, and so no choice."""
        return all(map(math.isfinite, self.sums))

    @property
    def best(self) -> int:
        return max(range(len(self.sums)), key=self.sums.__getitem__)

    @property
    def best_by_mean(self) -> int:
        return max(range(len(self.sums)), key=self.means.__getitem__)


@torch.no_grad()
def rank(
    backbone: Backbone,
    encoded: Sequence[Encoded],
    features: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    advance: Callable[[int], None] = lambda done: None,
) -> list[list[Choice]]:
    """Judge questions for all K experiments of the backbone's bank: K lists in the questions' order.

    `features(indices)` gives image features `B × P × D`. Questions are batched by length, so little is padded.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].prompt))
    most = max(1, MOST_ROWS // backbone.experiments)
    batches = _batches(order, [max(1, len(e.candidates)) for e in encoded], batch_size, most)
    found: list[tuple[int, int, Choice]] = []
    for chosen in distributed.shard(batches):
        batch = backbone.text.candidates([encoded[i] for i in chosen]).to(backbone.device)
        scores = backbone.score(backbone.query(features(chosen), batch), batch)
        sums, lengths = scores.sums_KM.tolist(), scores.lengths_M.tolist()
        at = 0
        for i in chosen:
            until = at + len(encoded[i].candidates)
            for k, row in enumerate(sums):
                found.append((k, i, Choice(tuple(row[at:until]), tuple(lengths[at:until]))))
            at = until
        advance(len(chosen))
    judged = {(k, i): choice for k, i, choice in distributed.all_gather(found)}
    return [[judged[k, i] for i in range(len(encoded))] for k in range(backbone.experiments)]


def _batches(order: Sequence[int], candidates: Sequence[int], batch_size: int, most: int) -> list[list[int]]:
    """Cut the order into batches of at most `batch_size` questions and `most` candidates, at least one question."""
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        if not batches or len(batches[-1]) == batch_size or rows + candidates[i] > most:
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += candidates[i]
    return batches


def predictions(questions: Sequence[Any], prompted: Sequence[Prompted], choices: Sequence[Choice]) -> list[dict]:
    """Records for `predictions.jsonl`: what was chosen and every candidate's score."""
    return [
        {
            "id": question.id,
            "prediction": p.candidates[choice.best],
            "prediction_by_mean": p.candidates[choice.best_by_mean],
            "answer": p.target,
            "correct": p.candidates[choice.best] == p.target,
            "candidates": [
                {"text": text, "sum": s, "mean": m, "tokens": n}
                for text, s, m, n in zip(p.candidates, choice.sums, choice.means, choice.lengths, strict=True)
            ],
        }
        for question, p, choice in zip(questions, prompted, choices, strict=True)
    ]


def summarize(questions: Sequence[Any], records: Sequence[dict]) -> dict[str, Any]:
    """Accuracy with interval, accuracy by mean, what chance would give, and the breakdowns."""
    correct = [record["correct"] for record in records]
    by_mean = [record["prediction_by_mean"] == record["answer"] for record in records]
    chance = sum(1 / len(record["candidates"]) for record in records) / len(records) if records else 0
    return {
        "method": "ranking",
        **accuracy(correct),
        "accuracy_by_mean": accuracy(by_mean)["accuracy"],
        "chance": round(100 * chance, 4),
        "by": breakdown(questions, correct),
    }
