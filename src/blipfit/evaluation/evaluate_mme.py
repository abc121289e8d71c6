"""Evaluate the model on MME: generate yes/no answers and score them by the official rule (`mme_scores.py`)."""

from dataclasses import replace

from blipfit.evaluation import generation, mme_scores
from blipfit.evaluation.evaluate_split import GetFeatures, build_feature_lookup
from blipfit.evaluation.evaluation_task import EvaluationTask, Settings, TaskResult, percent_values
from blipfit.model.backbone import Backbone

MAX_ANSWER_TOKENS = 10
"""The official rule reads only the first four characters of an answer."""


def evaluate_mme(backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, settings: Settings) -> TaskResult:
    """Answer MME's questions by greedy decoding and score the answers."""
    encoded_split = task.encoded_split
    (responses,) = generation.generate(
        backbone,
        encoded_split.encoded,
        build_feature_lookup(encoded_split, get_features),
        replace(generation.PRESETS["greedy"], max_tokens=MAX_ANSWER_TOKENS),
        settings.batch_size,
        partial=settings.partial,
    )
    answers: dict[str, list[mme_scores.Answer]] = {}
    records = []
    for question, response in zip(encoded_split.questions, responses, strict=True):
        answer = mme_scores.Answer(question.tags["file"], question.question, question.answer.lower(), response)
        answers.setdefault(question.tags["subtask"], []).append(answer)
        records.append(
            {
                "id": question.id,
                "prediction": response,
                "answer": question.answer,
                "correct": mme_scores.classify_response(response) == answer.truth,
            }
        )
    metrics = {
        **mme_scores.score_answers(answers),
        "method": "generation",
        "decoding": f"greedy, {MAX_ANSWER_TOKENS} tokens",
    }
    return TaskResult(records, metrics, {"accuracy": percent_values(records, "correct")})
