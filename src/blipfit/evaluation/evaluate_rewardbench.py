"""Evaluate the model on VL-RewardBench: likelihoods of both responses, its own answers, and generated judgments."""

from dataclasses import replace
from typing import Any

from blipfit.data.prompts import PromptedQuestion, clean_prompt
from blipfit.data.rewardbench import Pair
from blipfit.evaluation import generation, ranking, rewardbench_scores
from blipfit.evaluation.evaluate_open_answers import evaluate_open_answers
from blipfit.evaluation.evaluate_split import GetFeatures, build_feature_lookup
from blipfit.evaluation.evaluation_task import EvaluationTask, Settings, TaskResult
from blipfit.model.backbone import Backbone


def evaluate_rewardbench(
    backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, settings: Settings
) -> TaskResult:
    """Compare the likelihoods of the two responses of every pair, and evaluate the model's own answer to the query.

    With `settings.samples` the model also writes judgments of every pair, in both orders. Raises UserError with the
    question's id if a score is NaN or infinite.
    """
    pairs = task.pairs
    answers = evaluate_open_answers(backbone, task.encoded_split, get_features, settings)
    (ranked,) = ranking.rank(
        backbone,
        task.encoded_split.encoded,
        build_feature_lookup(task.encoded_split, get_features),
        settings.batch_size,
        partial=settings.partial,
    )
    ranking.require_finite(task.encoded_split.questions, ranked)
    sums = [(scores.sums[0], scores.sums[1]) for scores in ranked]
    means = [(scores.means[0], scores.means[1]) for scores in ranked]
    responses = [response for pair in pairs for response in pair.responses]
    metrics: dict[str, Any] = {
        "judge": "rewardbench",
        "likelihood_sum": rewardbench_scores.pairwise_accuracy(pairs, sums),
        "likelihood_mean": rewardbench_scores.pairwise_accuracy(pairs, means),
        "cut_responses": backbone.text.count_truncated_answers(responses),
        "answers": answers.metrics,
    }
    values = {
        "pairwise_sum": [_pair_value(pair, scores) for pair, scores in zip(pairs, sums, strict=True)],
        "pairwise_mean": [_pair_value(pair, scores) for pair, scores in zip(pairs, means, strict=True)],
        **answers.values,
    }
    for record, pair, pair_sums, pair_means in zip(answers.records, pairs, sums, means, strict=True):
        record |= {"category": pair.category, "best": pair.best, "sums": pair_sums, "means": pair_means}
    judgments: list[dict[str, Any]] = []
    if settings.samples:
        metrics["judgments"], judgments = _generate_judgments(backbone, task, get_features, settings)
    return TaskResult(answers.records, metrics, values, judgments)


def _pair_value(pair: Pair, scores: tuple[float, float]) -> float:
    """Return 100 if the preferred response has the higher score, 50 if both scores are equal, else 0."""
    preferred, rejected = scores[pair.best], scores[1 - pair.best]
    return 100.0 if preferred > rejected else 50.0 if preferred == rejected else 0.0


def _generate_judgments(
    backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Generate `settings.samples` judgments of every pair in each order; return their score and their records."""
    judgments, records, cut_prompts = [], [], 0
    preset_name = "sampling" if settings.samples > 1 else "greedy"
    for sample in range(settings.samples):
        decoding = replace(generation.PRESETS[preset_name], seed=sample)
        for swapped in (False, True):
            prompts = [clean_prompt(rewardbench_scores.judge_prompt(pair, swapped)) for pair in task.pairs]
            encoded = backbone.text.encode([PromptedQuestion(prompt, "", ()) for prompt in prompts])
            cut_prompts += sum(question.evaluation_prompt_is_cut for question in encoded)
            (texts,) = generation.generate(
                backbone,
                encoded,
                build_feature_lookup(task.encoded_split, get_features),
                decoding,
                settings.batch_size,
                partial=settings.partial and settings.partial.section(f"judgments-{sample}-{swapped:d}"),
            )
            for pair, text in zip(task.pairs, texts, strict=True):
                judgments.append(rewardbench_scores.Judgment(pair.id, pair.key, pair.best, swapped, text))
                records.append(rewardbench_scores.judgment_record(pair, swapped, text))
    scores = rewardbench_scores.score_judgments(judgments)
    return {**scores, "decoding": preset_name, "cut_prompts": cut_prompts}, records
