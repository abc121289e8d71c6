"""Answer questions by ranking: the candidate with the highest summed log-likelihood is the answer.

Source: the original experiments. The score is the SUM over a candidate's tokens (T5's end token included, Vicuna's
not), without length normalization; the mean is reported beside it. An answer is correct if its text is identical to
the text of the labeled choice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from blipfit.data.batches import EncodedQuestion
from blipfit.data.prompts import PromptedQuestion
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation.metrics import accuracy, breakdown
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.model.backbone import Backbone

MAX_ROWS = 512
"""Maximum number of candidates in one forward pass, over all experiments. It bounds the memory: a larger bank ranks
fewer questions at once."""


@dataclass(frozen=True, slots=True)
class QuestionScores:
    """The summed log-likelihood and the number of tokens of every candidate of one question."""

    sums: tuple[float, ...]
    lengths: tuple[int, ...]

    @property
    def means(self) -> tuple[float, ...]:
        """Log-likelihood per token of every candidate."""
        return tuple(s / n for s, n in zip(self.sums, self.lengths, strict=True))

    @property
    def finite(self) -> bool:
        """Whether all scores are finite numbers; a model with NaN or infinite weights gives none."""
        return all(map(math.isfinite, self.sums))

    @property
    def best(self) -> int:
        """Index of the candidate with the highest sum; of equal ones, the first."""
        return max(range(len(self.sums)), key=self.sums.__getitem__)

    @property
    def best_by_mean(self) -> int:
        """Index of the candidate with the highest mean; of equal ones, the first."""
        return max(range(len(self.sums)), key=self.means.__getitem__)


@torch.no_grad()
def rank(
    backbone: Backbone,
    encoded: Sequence[EncodedQuestion],
    features_at: Callable[[Sequence[int]], Tensor],
    batch_size: int,
    advance: Callable[[int], None] = lambda count: None,
    partial: PartialScores | None = None,
) -> list[list[QuestionScores]]:
    """Score the candidates of questions for all `K` experiments of the backbone's bank.

    `features_at(indices)` returns image features `B × P × D`. `advance(count)` is called after each batch with its
    number of questions. Questions of similar length share a batch, which keeps padding small. `partial`: scores of an
    evaluation that was interrupted; those that it has are not computed again. Returns `K` lists in the order of the
    questions.
    """
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].evaluation_prompt))
    max_candidates = max(1, MAX_ROWS // backbone.experiments)
    batches = _batches(order, [max(1, len(e.candidates)) for e in encoded], batch_size, max_candidates)

    def score_batch(indices: Sequence[int]) -> list[list[tuple[list[float], list[int]]]]:
        batch = backbone.text.candidates([encoded[i] for i in indices]).to(backbone.device)
        scores = backbone.score_candidates(backbone.query(features_at(indices), batch), batch)
        sums, lengths = scores.sums_KM.tolist(), scores.lengths_M.tolist()
        ends = list(accumulate(len(encoded[i].candidates) for i in indices))
        spans = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        return [[(row[span], lengths[span]) for span in spans] for row in sums]

    scores = (partial or PartialScores()).evaluate("ranking", batches, score_batch, advance, backbone.is_sharded)
    return [
        [QuestionScores(*map(tuple, scores[k, i])) for i in range(len(encoded))] for k in range(backbone.experiments)
    ]


def _batches(
    order: Sequence[int], candidate_counts: Sequence[int], batch_size: int, max_candidates: int
) -> list[list[int]]:
    """Split `order` into batches of at most `batch_size` questions and `max_candidates` candidates.

    A question with more candidates than that gets its own batch.
    """
    batches: list[list[int]] = []
    rows = 0
    for i in order:
        if not batches or len(batches[-1]) == batch_size or rows + candidate_counts[i] > max_candidates:
            batches.append([])
            rows = 0
        batches[-1].append(i)
        rows += candidate_counts[i]
    return batches


def find_non_finite(questions: Sequence[Question], ranked: Sequence[QuestionScores]) -> str | None:
    """Return the id of the first question with a score that is NaN or infinite, or None if there is none."""
    return next((q.id for q, scores in zip(questions, ranked, strict=True) if not scores.finite), None)


def require_finite(questions: Sequence[Question], ranked: Sequence[QuestionScores]) -> None:
    """Raise UserError with the id of the first question that has a NaN or infinite score, if there is one."""
    if (question_id := find_non_finite(questions, ranked)) is not None:
        raise UserError(non_finite_message(question_id))


def non_finite_message(question_id: str) -> str:
    """Return the error for a question whose score or loss is NaN or infinite."""
    return (
        f"question {question_id}: the model's score is NaN or infinite; check the weights of model and adapter, or use "
        "precision fp32"
    )


def prediction_records(
    questions: Sequence[Question], prompted: Sequence[PromptedQuestion], ranked: Sequence[QuestionScores]
) -> list[dict[str, Any]]:
    """Return the records for `predictions.jsonl`: the predicted answer and every candidate's scores."""
    return [
        {
            "id": question.id,
            "prediction": p.candidates[scores.best],
            "prediction_by_mean": p.candidates[scores.best_by_mean],
            "answer": p.target,
            "correct": p.candidates[scores.best] == p.target,
            "candidates": [
                {"text": text, "sum": s, "mean": m, "tokens": n}
                for text, s, m, n in zip(p.candidates, scores.sums, scores.means, scores.lengths, strict=True)
            ],
        }
        for question, p, scores in zip(questions, prompted, ranked, strict=True)
    ]


def summarize(questions: Sequence[Question], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return accuracy with its 95 % interval, accuracy by mean, chance level and accuracy by groups, in percent."""
    correct = [record["correct"] for record in records]
    correct_by_mean = [record["prediction_by_mean"] == record["answer"] for record in records]
    chance = sum(1 / len(record["candidates"]) for record in records) / len(records) if records else 0
    return {
        "method": "ranking",
        **accuracy(correct),
        "accuracy_by_mean": accuracy(correct_by_mean)["accuracy"],
        "chance": round(100 * chance, 4),
        "by": breakdown(questions, correct),
    }
