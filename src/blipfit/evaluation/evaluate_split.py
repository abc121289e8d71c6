"""Evaluate all experiments of a bank on one split, by ranking (questions with choices) or by generation (open answers).

There are two evaluations. `validate` is short and runs after every epoch; its score selects the best epoch.
`evaluate_split` is complete and gives all records and metrics. Both evaluate the `K` experiments of the backbone's bank
together; without a bank, `K` is 1 and the base model is evaluated.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import generation, ranking, text_metrics
from blipfit.evaluation.metrics import accuracy, breakdown
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.evaluation.ranking import QuestionScores
from blipfit.model.backbone import Backbone
from blipfit.recipe import EvaluationConfig

GetFeatures = Callable[[Sequence[Question]], torch.Tensor]
"""Returns the image features `B × P × D` of `B` questions."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """Validation of one experiment after an epoch.

    `measure` is the key in the log (`val_accuracy` or `val_loss`), `value` its value. `score` is the same number with
    the sign chosen so that higher is better.
    """

    measure: str
    value: float
    score: float
    non_finite_question: str | None = None
    """Id of the first question whose scores or loss are NaN or infinite."""

    @property
    def finite(self) -> bool:
        """Whether the value is a finite number; a model with NaN or infinite weights gives none."""
        return math.isfinite(self.value)


@dataclass(frozen=True, slots=True)
class SplitEvaluation:
    """Evaluation of one experiment on one split: one record per question, in order, and the metrics over all."""

    records: list[dict[str, Any]]
    metrics: dict[str, Any]
    finite: bool = True
    """Whether all scores are finite numbers."""
    non_finite_question: str | None = None
    """Id of the first question whose scores or loss are NaN or infinite."""

    def require_finite(self) -> None:
        """Raise UserError with the question's id if a score or loss is NaN or infinite."""
        if not self.finite:
            raise UserError(ranking.non_finite_message(str(self.non_finite_question)))


def validate(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    config: EvaluationConfig,
    partial: PartialScores | None = None,
) -> list[ValidationResult]:
    """Compute the score that selects the best epoch, one result per experiment.

    With ranking this is the accuracy in percent; with generation, `value` is the mean loss
    per label token and `score` its negative.
    """
    backbone.hf.eval()
    if config.method == "generation":
        losses = compute_losses(backbone, encoded_split, get_features, config.batch_size, partial)
        failed = find_non_finite_losses(backbone, encoded_split, get_features, config.batch_size, losses)
        return [ValidationResult("val_loss", loss, -loss, name) for loss, name in zip(losses, failed, strict=True)]
    results = []
    for scores in _rank(backbone, encoded_split, get_features, config, partial):
        records = ranking.prediction_records(encoded_split.questions, encoded_split.prompted, scores)
        correct = [record["correct"] for record in records]
        non_finite = ranking.find_non_finite(encoded_split.questions, scores)
        percent = 100 * sum(correct) / len(correct) if non_finite is None else math.nan
        results.append(ValidationResult("val_accuracy", percent, percent, non_finite))
    return results


def evaluate_split(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    config: EvaluationConfig,
    partial: PartialScores | None = None,
) -> list[SplitEvaluation]:
    """Evaluate every experiment on a split, with all records and metrics; one result per experiment.

    `partial`: scores and answers of an evaluation that was interrupted; those that it has are not computed again.
    """
    backbone.hf.eval()
    if config.method == "generation":
        losses = compute_losses(backbone, encoded_split, get_features, config.batch_size, partial)
        failed = find_non_finite_losses(backbone, encoded_split, get_features, config.batch_size, losses)
        texts = generate_texts(backbone, encoded_split, get_features, config, partial)
        return [
            dataclasses.replace(_score_texts(encoded_split, t, loss, config), non_finite_question=question_id)
            for loss, t, question_id in zip(losses, texts, failed, strict=True)
        ]
    evaluations = []
    for scores in _rank(backbone, encoded_split, get_features, config, partial):
        records = ranking.prediction_records(encoded_split.questions, encoded_split.prompted, scores)
        metrics = ranking.summarize(encoded_split.questions, records)
        non_finite = ranking.find_non_finite(encoded_split.questions, scores)
        evaluations.append(SplitEvaluation(records, metrics, non_finite is None, non_finite))
    return evaluations


def check_evaluation(config: EvaluationConfig, name: str, splits: Mapping[str, Sequence[Question]]) -> None:
    """Raise UserError if a data set cannot be evaluated as configured.

    `name` is the data set's name for messages, `splits` its questions by split.
    """
    if config.method == "ranking":
        for split in ("val", "test"):
            if open_question := next((q for q in splits[split] if not q.choices), None):
                raise UserError(
                    f"{name} {split} {open_question.id} has no choices, but ranking needs them; add choices, or "
                    "evaluate open answers with --set evaluation.method=generation"
                )
    generation.get_preset(config.decoding)


@torch.no_grad()
def compute_losses(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    batch_size: int,
    partial: PartialScores | None = None,
) -> list[float]:
    """Compute the mean negative log-likelihood per label token, one value per experiment.

    Prompts and answers are truncated as in training.
    """
    encoded = encoded_split.encoded
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].evaluation_prompt) + len(encoded[i].target))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    features_at = build_feature_lookup(encoded_split, get_features)

    def compute_batch(indices: Sequence[int]) -> list[list[Any]]:
        batch = backbone.text.targets([encoded[i] for i in indices]).to(backbone.device)
        losses_K = backbone.losses(backbone.query(features_at(indices), batch), batch).float()
        others = [0.0] * (len(indices) - 1)  # the first question stands for its batch
        return [[loss, *others] for loss in losses_K]  # tensors: nothing waits for the device

    losses = (partial or PartialScores()).evaluate(
        "losses", batches, compute_batch, equal_batch_counts=backbone.is_sharded
    )
    labels = sum(len(e.target) for e in encoded)
    sums = [_sum_fp32([losses[k, batch[0]] for batch in batches]) for k in range(backbone.experiments)]
    return [total / labels for total in sums]


def _sum_fp32(values: Sequence[float | torch.Tensor]) -> float:
    """Sum numbers one after the other in fp32, as a device adds them up."""
    total = torch.zeros(())
    for value in values:
        total += value.item() if isinstance(value, torch.Tensor) else value
    return total.item()


@torch.no_grad()
def find_non_finite_losses(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    batch_size: int,
    losses: Sequence[float],
) -> list[str | None]:
    """Return, for each experiment, the id of the first question with a NaN or infinite loss, or None.

    `losses` is the result of `compute_losses`; only if one of them is not finite are losses computed again, batch by
    batch, and question by question in a batch that has one.
    """
    non_finite: list[str | None] = [None] * len(losses)
    missing = {k for k, loss in enumerate(losses) if not math.isfinite(loss)}
    rows = range(len(encoded_split))
    batches = [rows[start : start + batch_size] for start in rows[::batch_size]] if missing else []
    for batch in batches:
        if missing & _non_finite_experiments(backbone, encoded_split, get_features, batch):
            for i in batch:
                failed = missing & _non_finite_experiments(backbone, encoded_split, get_features, [i])
                for k in failed:
                    non_finite[k] = encoded_split.questions[i].id
                missing -= failed
    return non_finite


def _non_finite_experiments(
    backbone: Backbone, encoded_split: EncodedSplit, get_features: GetFeatures, rows: Sequence[int]
) -> set[int]:
    """Return the experiments whose loss on these questions is NaN or infinite."""
    batch = backbone.text.targets([encoded_split.encoded[i] for i in rows]).to(backbone.device)
    visual = backbone.query(build_feature_lookup(encoded_split, get_features)(rows), batch)
    return {k for k, loss in enumerate(backbone.losses(visual, batch).tolist()) if not math.isfinite(loss)}


def generate_texts(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    config: EvaluationConfig,
    partial: PartialScores | None = None,
) -> list[list[str]]:
    """Generate an answer to every question; one list of answers per experiment."""
    return generation.generate(
        backbone,
        encoded_split.encoded,
        build_feature_lookup(encoded_split, get_features),
        generation.get_preset(config.decoding),
        config.batch_size,
        partial=partial,
    )


def build_feature_lookup(
    encoded_split: EncodedSplit, get_features: GetFeatures
) -> Callable[[Sequence[int]], torch.Tensor]:
    """Return a function that gives the image features `B × P × D` of questions by their indices in the split."""
    return lambda indices: get_features([encoded_split.questions[i] for i in indices])


def _rank(
    backbone: Backbone,
    encoded_split: EncodedSplit,
    get_features: GetFeatures,
    config: EvaluationConfig,
    partial: PartialScores | None,
) -> list[list[QuestionScores]]:
    features_at = build_feature_lookup(encoded_split, get_features)
    return ranking.rank(backbone, encoded_split.encoded, features_at, config.batch_size, partial=partial)


def _score_texts(
    encoded_split: EncodedSplit, predictions: Sequence[str], loss: float, config: EvaluationConfig
) -> SplitEvaluation:
    """Compare generated answers with the references: correct means equal after normalization."""
    references = [prompted.target for prompted in encoded_split.prompted]
    scores = text_metrics.score_texts(predictions, references)
    correct = [bool(value) for value in scores["samples"]["exact"]]
    records = [
        {
            "id": question.id,
            "prediction": prediction,
            "answer": reference,
            "correct": is_correct,
            **{name: round(values[i], 6) for name, values in scores["samples"].items() if name in text_metrics.ROUGE},
        }
        for i, (question, prediction, reference, is_correct) in enumerate(
            zip(encoded_split.questions, predictions, references, correct, strict=True)
        )
    ]
    groups = breakdown(encoded_split.questions, correct)
    del groups["choices"]  # open questions have no choices, so this would be a single group
    metrics = {
        "method": config.method,
        "decoding": config.decoding,
        "loss": loss,
        **accuracy(correct),
        "stemmer": scores["stemmer"],
        "texts": scores["metrics"],
        "rouge_unread": scores["rouge_unread"],
        "by": groups,
    }
    return SplitEvaluation(records, metrics, math.isfinite(loss))
