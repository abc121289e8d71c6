"""Retention: how much of an original model's performance other models keep, on the same samples.

Every data set gives each sample a score from 0 to 1 and a chance level. Questions with choices and VL-RewardBench's
pairs are scored by the likeliest candidate, MME by its official rule, open answers by ROUGE-L (chance 0).
Retention is the candidate model's mean score divided by the original's: raw, and corrected for chance,
(mean − chance) / (original's mean − chance). Intervals are paired bootstraps: every resample takes the same samples of
both models, so the differences in difficulty between samples cancel.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipfit.adapters import open_model
from blipfit.data.image_hashes import digest_images
from blipfit.errors import UserError
from blipfit.evaluation import bootstrap, ranking
from blipfit.evaluation.evaluate_data_sets import evaluate_task
from blipfit.evaluation.evaluate_split import GetFeatures, build_feature_lookup
from blipfit.evaluation.evaluation_task import EvaluationTask, Settings, load_task
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures


@dataclass(frozen=True, slots=True)
class SampleScores:
    """One model's scores on one data set, in the order of the samples."""

    sample_ids: list[str]
    scores: list[float]
    """0 to 1 per sample."""
    chance: list[float]
    """Expected score of a random answer, 0 to 1 per sample."""
    images_sha256: str = ""
    """Digest of the samples' images (`image_hashes.digest_images`)."""


def score_task(backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, settings: Settings) -> SampleScores:
    """Evaluate the model on one data set; return a score per sample."""
    sample_ids = [question.id for question in task.encoded_split.questions]
    if task.name == "rewardbench":
        scores = _score_pairs(backbone, task, get_features, settings.batch_size)
        return SampleScores(sample_ids, scores, [0.5] * len(sample_ids))
    result = evaluate_task(backbone, task, get_features, settings)
    if "accuracy" not in result.values:
        return SampleScores(sample_ids, [value / 100 for value in result.values["rougeL"]], [0.0] * len(sample_ids))
    # MME's questions have no candidates but two possible answers, yes and no.
    candidates = [len(prompted.candidates) or 2 for prompted in task.encoded_split.prompted]
    scores = [value / 100 for value in result.values["accuracy"]]
    return SampleScores(sample_ids, scores, [1 / count for count in candidates])


def _score_pairs(backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, batch_size: int) -> list[float]:
    """Return 1 for a pair if its preferred response is the likelier one, 0.5 if both are equal, else 0."""
    features_at = build_feature_lookup(task.encoded_split, get_features)
    (ranked,) = ranking.rank(backbone, task.encoded_split.encoded, features_at, batch_size)
    ranking.require_finite(task.encoded_split.questions, ranked)
    return [
        0.5 if scores.sums[0] == scores.sums[1] else float(scores.best == pair.best)
        for scores, pair in zip(ranked, task.pairs, strict=True)
    ]


def score_models(
    names: Sequence[str],
    data_sets: Sequence[tuple[str, Path]],
    device: torch.device | str,
    split: str = "test",
    limit: int | None = None,
    settings: Settings | None = None,
    announce: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, SampleScores]]:
    """Evaluate every model on every data set; only one model is in memory at a time.

    `names` are models or finished runs, `data_sets` names with their folders. MME is always evaluated on its only
    split, test. `announce` receives one sentence before each evaluation. Returns one dictionary per model: data set →
    scores. Raises UserError if a model or a data set cannot be loaded, or if a data set changes meanwhile.
    """
    results: list[dict[str, SampleScores]] = []
    for name in names:
        with open_model.open_model(name, device, "auto").adapter() as backbone:
            get_features = ImageFeatures.from_backbone(backbone, "off").features
            model_scores: dict[str, SampleScores] = {}
            for data_set, folder in data_sets:
                task_split = "test" if data_set == "mme" else split
                task = load_task(backbone, data_set, folder, task_split, limit=limit)
                announce(f"{name} on {data_set}: {len(task.encoded_split)} samples")
                scores = score_task(backbone, task, get_features, settings or Settings())
                digest = digest_images(task.encoded_split.questions)
                model_scores[data_set] = replace(scores, images_sha256=digest)
            results.append(model_scores)
    for model_scores in results:
        for data_set, scores in model_scores.items():
            first = results[0][data_set]
            if (scores.sample_ids, scores.images_sha256) != (first.sample_ids, first.images_sha256):
                raise UserError(f"the questions or images of {data_set} changed during the evaluation; run it again")
    return results


def summarize(scores: SampleScores, seed: int = 0) -> dict[str, Any]:
    """Return the mean score with its 95 % interval and the chance level, in percent."""
    mean = bootstrap.mean(scores.scores, seed=seed)
    return {
        "accuracy": round(100 * mean["mean"], 4),
        "interval": [round(100 * end, 4) for end in mean["interval"]],
        "chance": round(100 * sum(scores.chance) / len(scores.chance), 4),
        "samples": len(scores.sample_ids),
        **({"images_sha256": scores.images_sha256} if scores.images_sha256 else {}),
    }


def compute_retention(original: SampleScores, candidate: SampleScores, seed: int = 0) -> dict[str, Any]:
    """Return the candidate's retention, raw and corrected for chance, with paired 95 % intervals, and its own mean.

    Corrected retention is None if the lower end of the 95 % confidence interval of the original's mean minus chance is
    not above 0: the original is not surely better than chance.
    """
    scores, chance = np.asarray(original.scores, dtype=float), np.asarray(original.chance, dtype=float)
    candidate_scores = np.asarray(candidate.scores, dtype=float)
    above_chance = bootstrap.mean(scores - chance, seed=seed)
    corrected: dict[str, Any] = {"ratio": None, "interval": None, "samples": len(scores)}
    if above_chance["interval"] is not None and above_chance["interval"][0] > 0:
        corrected = bootstrap.ratio(scores - chance, candidate_scores - chance, seed=seed)
    return {
        **summarize(candidate, seed),
        "difference": bootstrap.difference(scores, candidate_scores, seed=seed),
        "raw": bootstrap.ratio(scores, candidate_scores, seed=seed),
        "corrected": corrected,
    }


def may_be_below(retention: Mapping[str, Any], at_least: float) -> bool:
    """Whether the lower end of the 95 % confidence interval of the corrected retention is below `at_least`.

    `retention` is a result of `compute_retention`. True also if there is no corrected retention.
    """
    interval = retention["corrected"]["interval"]
    return interval is None or interval[0] is None or interval[0] < at_least


def pareto_front(points: Sequence[tuple[Sequence[float], float | None]]) -> list[bool]:
    """Return for each (costs, quality) whether it is on the Pareto front.

    A point is off the front if another point is at least as good in every cost and in quality, and better in one of
    them. A point without a quality (None) is off the front if any point has one.
    """

    def dominates(a: tuple[Sequence[float], float | None], b: tuple[Sequence[float], float | None]) -> bool:
        if a[1] is None or b[1] is None:
            return b[1] is None and a[1] is not None
        no_worse = all(x <= y for x, y in zip(a[0], b[0], strict=True)) and a[1] >= b[1]
        return no_worse and (tuple(a[0]) != tuple(b[0]) or a[1] > b[1])

    return [not any(dominates(other, point) for other in points) for point in points]
