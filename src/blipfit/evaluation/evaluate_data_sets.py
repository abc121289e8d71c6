"""Evaluate a model on several data sets, with and without an adapter, and write one record per data set.

Questions with choices are ranked. Open questions are answered by generation (`evaluate_open_answers.py`); MME and
VL-RewardBench follow their official rules (`evaluate_mme.py`, `evaluate_rewardbench.py`).
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from blipfit import disk_space
from blipfit import run_folder as folders
from blipfit.adapters.open_model import OpenedModel
from blipfit.data import text_warnings
from blipfit.data.image_hashes import digest_images
from blipfit.evaluation import bootstrap, evaluate_split, mme_scores
from blipfit.evaluation.disk_needs import prediction_bytes
from blipfit.evaluation.evaluate_mme import evaluate_mme
from blipfit.evaluation.evaluate_open_answers import evaluate_open_answers
from blipfit.evaluation.evaluate_rewardbench import evaluate_rewardbench
from blipfit.evaluation.evaluate_split import GetFeatures
from blipfit.evaluation.evaluation_task import EvaluationTask, Settings, TaskResult, percent_values
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.file_writes import remove_leftovers
from blipfit.model.backbone import Backbone
from blipfit.recipe import EvaluationConfig
from blipfit.run_folder import Evaluation
from blipfit.runtime import distributed, interruption

BASE, TUNED = "base", "tuned"


def evaluate_task(
    backbone: Backbone, task: EvaluationTask, get_features: GetFeatures, settings: Settings
) -> TaskResult:
    """Evaluate the model on one data set.

    If a bank is installed in the backbone, it must hold exactly one experiment. Raises UserError with the question's
    id if a score is NaN or infinite.
    """
    backbone.hf.eval()
    if task.name == "mme":
        return evaluate_mme(backbone, task, get_features, settings)
    if task.name == "rewardbench":
        return evaluate_rewardbench(backbone, task, get_features, settings)
    if all(question.choices for question in task.encoded_split.questions):
        config = EvaluationConfig(batch_size=settings.batch_size)
        (evaluation,) = evaluate_split.evaluate_split(
            backbone, task.encoded_split, get_features, config, settings.partial
        )
        evaluation.require_finite()
        accuracies = percent_values(evaluation.records, "correct")
        return TaskResult(evaluation.records, evaluation.metrics, {"accuracy": accuracies})
    return evaluate_open_answers(backbone, task.encoded_split, get_features, settings)


def compare_with_adapter(
    model: OpenedModel,
    tasks: Sequence[EvaluationTask],
    get_features: GetFeatures,
    settings: Settings,
    get_evaluation: Callable[[EvaluationTask], Evaluation],
    common_fields: Mapping[str, Any],
    announce: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Evaluate the base model, then the model with its adapter if it has one, and write one record per task.

    `get_evaluation` gives the folder that a task's files are written to. `common_fields` are added to every record.
    `announce` receives one sentence before each evaluation. What an interrupted evaluation has answered is not
    evaluated again. Returns the records in the order of the tasks. Raises UserError if the adapter does not fit the
    model, and Interrupted, after saving, if a signal arrives.
    """
    backbone = model.backbone
    partials = [_open_partial_scores(model, task, settings, get_evaluation(task)) for task in tasks]
    timestamps = [time.perf_counter()]

    def evaluate_all(variant: str) -> list[TaskResult]:
        results = []
        for task, partial in zip(tasks, partials, strict=True):
            announce(f"{task.title}, {variant}: {len(task.encoded_split)} questions")
            task_settings = dataclasses.replace(settings, partial=partial.section(variant))
            with interruption.deferred():
                results.append(evaluate_task(backbone, task, get_features, task_settings))
                partial.save()
            timestamps.append(time.perf_counter())
        return results

    results = {BASE: evaluate_all(BASE)}
    if model.source.adapter is not None:
        with model.adapter():
            results[TUNED] = evaluate_all(TUNED)
        common_fields = {**common_fields, "adapter_sha256": model.source.adapter_sha256}
    durations = [end - start for start, end in pairwise(timestamps)]
    records = []
    for number, task in enumerate(tasks):
        task_results = {variant: variant_results[number] for variant, variant_results in results.items()}
        record = {
            **_task_fields(backbone, task, settings),
            **common_fields,
            **_result_fields(task_results),
            "seconds": round(sum(durations[number :: len(tasks)]), 3),
        }
        _write_evaluation(get_evaluation(task), task, task_results, record)
        partials[number].delete()
        records.append(record)
    return records


def _require_space(task: EvaluationTask, evaluation: Evaluation, variants: int) -> None:
    """Remove what killed evaluations left in a task's folder; raise UserError if the disk lacks room for its files."""
    remove_leftovers(evaluation.folder)
    # Each record is written twice: the scores of an unfinished evaluation are deleted when the whole is written.
    needed = 2 * variants * prediction_bytes(task.encoded_split.questions)
    disk_space.require_space(evaluation.folder, needed, f"the records of {task.title}")


def _open_partial_scores(
    model: OpenedModel, task: EvaluationTask, settings: Settings, evaluation: Evaluation
) -> PartialScores:
    """The scores that an interrupted evaluation saved, if it was of the same weights, questions and settings.

    Raises UserError if the disk lacks room for the evaluation's files.
    """
    _require_space(task, evaluation, 1 if model.source.adapter is None else 2)
    subject = {
        "base_sha256": model.backbone.base_sha256,
        "adapter_sha256": model.source.adapter_sha256,
        "precision": str(model.backbone.autocast_dtype),
        "questions": hashlib.sha256(repr(task.encoded_split.encoded).encode()).hexdigest(),
        "images_sha256": digest_images(task.encoded_split.questions),
        "settings": [settings.batch_size, settings.decoding, settings.samples],
        "versions": folders.versions(),
    }
    return PartialScores([evaluation.partial_scores_file], lambda: [json.dumps(subject)])


def _task_fields(backbone: Backbone, task: EvaluationTask, settings: Settings) -> dict[str, Any]:
    return {
        "on": task.name,
        "split": task.split,
        "questions": len(task.encoded_split),
        "images_sha256": digest_images(task.encoded_split.questions),
        "texts": text_warnings.summarize_texts(backbone.text, {task.split: task.encoded_split}),
        "prompt": task.prompt,
        "prompt_example": task.encoded_split.prompted[0].prompt,
        "model": backbone.name,
        "batch_size": settings.batch_size,
        "clip": None if settings.clip is None else settings.clip.name,
        "device": distributed.device_name(backbone.device),
        "precision": str(backbone.autocast_dtype or "torch.float32").removeprefix("torch."),
        "versions": folders.versions(),
    }


def _result_fields(results: Mapping[str, TaskResult]) -> dict[str, Any]:
    """The metrics of a task without and with the adapter, and their differences."""
    metrics = {variant: result.metrics for variant, result in results.items()}
    difference = {"difference": _differences(results[BASE], results[TUNED])} if TUNED in results else {}
    return {**metrics, **difference}


def _write_evaluation(
    evaluation: Evaluation, task: EvaluationTask, results: Mapping[str, TaskResult], record: Mapping[str, Any]
) -> None:
    """Write all files of an evaluation. The record comes last: an evaluation with a record is complete."""
    lines = [{"who": variant, **line} for variant, result in results.items() for line in result.records]
    folders.write_lines(evaluation.predictions_file, lines)
    for variant, result in results.items():
        if task.name == "mme":
            responses = [line["prediction"] for line in result.records]
            mme_scores.write_answers(evaluation.answers(variant), task.encoded_split.questions, responses)
        if result.judgments:
            folders.write_lines(evaluation.judgments_file(variant), result.judgments)
    folders.write_json(evaluation.record_file, record)


def _differences(base: TaskResult, tuned: TaskResult) -> dict[str, Any]:
    """Return tuned minus base with paired bootstrap intervals; MME's official totals have no interval."""
    differences = {name: bootstrap.difference(values, tuned.values[name]) for name, values in base.values.items()}
    if base.metrics.get("judge") == "mme":
        for total in ("perception", "cognition"):
            difference = round(tuned.metrics[total] - base.metrics[total], 2)
            differences[total] = {"difference": difference, "interval": None}
    return differences
