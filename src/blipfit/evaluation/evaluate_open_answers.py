"""Evaluate generated answers: ROUGE, exact match and, with a CLIP model, the CLIP score."""

from collections.abc import Sequence

from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import bootstrap, clip_score, evaluate_split
from blipfit.evaluation.clip_score import ClipScores
from blipfit.evaluation.evaluate_split import GetFeatures
from blipfit.evaluation.evaluation_task import Settings, TaskResult, percent_values
from blipfit.model.backbone import Backbone
from blipfit.model.clip import Clip
from blipfit.recipe import EvaluationConfig


def evaluate_open_answers(
    backbone: Backbone, encoded_split: EncodedSplit, get_features: GetFeatures, settings: Settings
) -> TaskResult:
    """Generate an answer to every question and compare it with the reference answer and, with a CLIP, the image.

    Raises UserError with the question's id if the loss of a reference answer is NaN or infinite.
    """
    config = EvaluationConfig(method="generation", decoding=settings.decoding, batch_size=settings.batch_size)
    (evaluation,) = evaluate_split.evaluate_split(backbone, encoded_split, get_features, config, settings.partial)
    evaluation.require_finite()
    records, metrics = evaluation.records, evaluation.metrics
    values = {"rougeL": percent_values(records, "rougeL"), "exact": percent_values(records, "correct")}
    if settings.clip is not None:
        predictions = [record["prediction"] for record in records]
        scores = score_clip(settings.clip, encoded_split, predictions, settings.batch_size)
        values["clip_score"] = list(scores.values)
        metrics["clip_score"] = {
            "clip": settings.clip.name,
            "cut": scores.truncated_texts,
            **bootstrap.mean(scores.values),
            "rule": "mean_of_clamped",
            "mean_of_clamped": scores.mean_of_clamped,
            "clamped_mean": scores.clamped_mean,
        }
        for record, value in zip(records, scores.values, strict=True):
            record["clip_score"] = round(value, 4)
    return TaskResult(records, metrics, values)


def score_clip(clip: Clip, encoded_split: EncodedSplit, predictions: Sequence[str], batch_size: int) -> ClipScores:
    """Score the answers to questions with the questions' images, whose transparency is shown as to the model."""
    questions = encoded_split.questions
    images, transparency = [q.image for q in questions], [q.transparency for q in questions]
    return clip_score.score(clip, images, predictions, batch_size, transparency)
