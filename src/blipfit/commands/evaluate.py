"""`blipfit evaluate`: a finished run on its own data set, or a run or model on other data sets with `--on`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit.adapters import open_model
from blipfit.adapters.open_model import Source, warning_fields
from blipfit.commands import resolve_arguments
from blipfit.data import encoded_split, text_warnings
from blipfit.data.image_hashes import digest_images
from blipfit.data.mme import COGNITION, MAX_SCORE, PERCEPTION
from blipfit.errors import UserError
from blipfit.evaluation import changed_data, evaluate_data_sets, evaluate_split, text_metrics
from blipfit.evaluation.evaluate_data_sets import BASE, TUNED
from blipfit.evaluation.evaluation_task import EvaluationTask, Settings, load_task
from blipfit.model import clip, tiny
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.report import terminal
from blipfit.run_folder import Evaluation, Run

WITH_OPEN_ANSWERS = {"own", "rewardbench"}
"""Data sets whose answers can be open, so that a CLIP score is computed."""


def run(
    folder: Path,
    data: Path | None,
    split: str,
    device: torch.device | str,
    base: bool = False,
    model_name: str | None = None,
) -> dict[str, Any]:
    """Evaluate a finished run again on a split of its own data set; with `base` the untrained model beside it.

    `model_name`: the base model, if it is not where the run's recipe says. The record has `warnings` if it has other
    weights, or if the questions or images are not those that the run was made with. Raises UserError if the folder is
    no finished run, or if its adapter or base model is not the one it was made with.
    """
    recipe = Run(folder).recipe()
    place = resolve_arguments.data_folder(recipe.data.name, data)
    base_model = None if model_name is None else ModelConfig(name=model_name)
    model = open_model.load(open_model.locate_adapter(folder, base_model), device)
    questions = encoded_split.load(model.backbone.text, recipe.data, place, split)
    features = ImageFeatures.for_evaluation(model.backbone, recipe.data.images)

    def metrics(backbone: Backbone) -> dict[str, Any]:
        (evaluation,) = evaluate_split.evaluate_split(backbone, questions, features.features, recipe.evaluation)
        evaluation.require_finite()
        return evaluation.metrics

    record: dict[str, Any] = {"run": str(folder), "experiment": recipe.title, "split": split}
    changes = changed_data.describe_changes(Run(folder), split, questions.questions, place)
    record |= _announce_warnings([*model.source.warnings, *changes])
    if base:
        record["base"] = metrics(model.backbone)
    with model.adapter() as backbone:
        record["tuned"] = metrics(backbone)
    record["adapter_sha256"], record["base_sha256"] = model.source.adapter_sha256, model.backbone.base_sha256
    record["images_sha256"] = digest_images(questions.questions)
    record["recorded"] = Run(folder).result()["metrics"].get(split, {}).get("accuracy")
    return record


def _announce_warnings(warnings: Sequence[str]) -> dict[str, list[str]]:
    """Print warnings on stderr, and return them as a part of the record."""
    screen = terminal.console(stderr=True)
    for warning in warnings:
        screen.print(f"warning: {warning}", soft_wrap=True)
    return warning_fields(warnings)


def render(record: Mapping[str, Any]) -> list[Any]:
    """Accuracy with its interval beside chance and the recorded one, then accuracies by group."""
    tuned, recorded = record["tuned"], record["recorded"]
    lines = [f"{record['experiment']} on {record['split']} ({tuned['questions']} questions), by {tuned['method']}"]
    if "base" in record:
        lines.append(f"base model:   {terminal.format_score(record['base'])}")
    chance = f"   chance {tuned['chance']:.1f}" if "chance" in tuned else ""
    lines.append(f"with adapter: {terminal.format_score(tuned)}{chance}")
    if recorded is not None and chance:
        lines.append(f"recorded after training: {recorded:.1f}")
    lines += _text_notes(tuned)
    return [*lines, terminal.breakdown_table(tuned, "accuracy by group")] if tuned["by"] else lines


@dataclass(frozen=True, slots=True)
class OnOptions:
    """How a run or model is evaluated on other data sets."""

    data: Path | None = None
    """Folder, if there is one data set."""
    split: str = "test"
    limit: int | None = None
    """Only the first so many questions of each data set."""
    decoding: str = "greedy"
    samples: int = 0
    """VL-RewardBench: written judgments, in both orders of the responses."""
    clip: str | None = None
    """CLIP model for the CLIP score of open answers."""
    results: Path = Path("results")
    model: str | None = None
    """The base model of a run or adapter, if it is not where its recipe says."""


def run_on(subject: str, on: str, device: torch.device, options: OnOptions | None = None) -> list[dict[str, Any]]:
    """Evaluate a run folder or a model on every data set of `on` (`icons,mme=DIR`); one record per data set, written
    and returned.

    Raises UserError if the subject or a data set cannot be used, or if the run was trained on the questions.
    """
    options = options or OnOptions()
    screen = terminal.console(stderr=True)
    base = None if options.model is None else ModelConfig(name=options.model)
    source = open_model.locate_model(subject, base)
    if base is not None and source.adapter is None:
        raise UserError(f"{subject} is a model without an adapter, so --model has no meaning; leave one of them out")
    folders = resolve_arguments.data_folders(on, options.data)
    _refuse_training_questions(folders, options.split, None if source.recipe is None else source.recipe.data.name)
    settings = Settings(
        decoding=options.decoding,
        samples=options.samples,
        clip=_load_clip(source.model.name, options.clip, folders, device),
    )
    model = open_model.load(source, device)
    mode = "stored" if source.recipe is None else source.recipe.data.images
    image_features = ImageFeatures.for_evaluation(model.backbone, mode)
    image_features.announce = lambda sentence: screen.print(sentence, soft_wrap=True)
    tasks = [_read_task(model.backbone, source, name, folder, options) for name, folder in folders]
    image_features.prepare([question for task in tasks for question in task.encoded_split.questions])

    def evaluation_folder(task: EvaluationTask) -> Evaluation:
        if source.run is not None:
            return source.run.evaluation(task.title)
        return Evaluation.of_model(options.results, subject, task.title)

    return evaluate_data_sets.compare_with_adapter(
        model,
        tasks,
        image_features.features,
        settings,
        evaluation_folder,
        {
            "run": None if source.adapter is None else subject,
            "base_sha256": model.backbone.base_sha256,
            **_announce_warnings([*model.source.warnings, *_describe_changed_images(source, folders, options.split)]),
        },
        announce=lambda sentence: screen.print(sentence, soft_wrap=True),
    )


def _describe_changed_images(source: Source, folders: Sequence[tuple[str, Path]], split: str) -> list[str]:
    """Sentences on the run's own data set among those that it is evaluated on, if it has other images now."""
    if source.run is None:
        return []
    changes = [changed_data.describe_changed_images(source.run, name, split, folder) for name, folder in folders]
    return [sentence for sentences in changes for sentence in sentences]


def _read_task(backbone: Backbone, source: Source, name: str, folder: Path, options: OnOptions) -> EvaluationTask:
    recipe = source.recipe
    prompt = recipe.data.prompt if recipe is not None and recipe.data.name == name else None
    return load_task(backbone, name, folder, "test" if name == "mme" else options.split, prompt, options.limit)


def _refuse_training_questions(folders: Sequence[tuple[str, Path]], split: str, trained_on: str | None) -> None:
    names = [name for name, _ in folders]
    if split == "all" and (others := [name for name in names if name not in ("rewardbench", "mme")]):
        raise UserError(f"--split all is for rewardbench, not for {', '.join(others)}; choose train, val or test")
    if split == "all" and trained_on == "rewardbench":
        raise UserError("this run was trained on rewardbench's split train; evaluate it with --split test")


def _load_clip(
    model_name: str, clip_name: str | None, folders: Sequence[tuple[str, Path]], device: torch.device
) -> clip.Clip | None:
    """The CLIP that the user names, else the embedded one if the model is a miniature.

    None if there is neither, or if no data set has open answers. Raises UserError if the user names one for nothing.
    """
    if not {dataset for dataset, _ in folders} & WITH_OPEN_ANSWERS:
        if clip_name is not None:
            names = " and ".join(sorted(WITH_OPEN_ANSWERS))
            raise UserError(f"--clip is for open answers, which only {names} have; leave it out")
        return None
    name = clip_name or (tiny.CLIP_NAME if model_name in tiny.NAMES.values() else None)
    return None if name is None else clip.load(name, device)


def render_on(records: Sequence[Mapping[str, Any]]) -> list[Any]:
    """One table over all data sets: base model, with adapter, difference."""
    table = Table(title=f"{records[0]['run'] or records[0]['model']}", title_justify="left")
    has_adapter = TUNED in records[0]
    for column in ("on", "metric"):
        table.add_column(column)
    for column in ("questions", "base", *(("with adapter", "difference [95 %]") if has_adapter else ())):
        table.add_column(column, justify="right")
    for record in records:
        _add_rows(table, record, has_adapter)
    lines: list[Any] = [table]
    for record in records:
        lines += _notes(record)
    return lines


def _add_rows(table: Table, record: Mapping[str, Any], has_adapter: bool) -> None:
    """One row per metric of a data set."""
    values = {subject: _format_metrics(record[subject]) for subject in (BASE, TUNED) if subject in record}
    for number, metric in enumerate(values[BASE]):
        is_first = number == 0
        row = [f"{record['on']} {record['split']}" if is_first else "", metric]
        row += [str(record["questions"]) if is_first else "", values[BASE][metric]]
        if has_adapter:
            difference = record["difference"].get(_DIFFERENCE_KEYS.get(metric, ""))
            row += [values[TUNED][metric], _format_difference(difference)]
        table.add_row(*row, end_section=number == len(values[BASE]) - 1)


def _notes(record: Mapping[str, Any]) -> list[str]:
    name, base = record["on"], record[BASE]
    lines = [f"{name}: prompt {record['prompt']}, one in full: {record['prompt_example']!r}"]
    if missing := base.get("missing"):
        lines.append(f"{name}: not in the totals, no questions: {', '.join(missing)}")
    lines += [f"{name}: not the MME benchmark: {difference}" for difference in base.get("deviations", ())]
    if texts := record.get("texts"):
        limits = texts["max_text_tokens"], texts["max_target_tokens"]
        lines += [
            f"{name}: {line}"
            for line in text_warnings.describe_reading(texts[record["split"]], *limits, record["prompt"])
        ]
    lines += [f"{name}: {sentence}" for sentence in _text_notes(record.get(TUNED, base))]
    if cut := base.get("cut_responses"):
        lines.append(
            f"{name}: {cut} responses are longer than the model reads; their likelihood is of the part that it reads"
        )
    if name in ("rewardbench", "own") and record["clip"] is None:
        lines.append(f"{name}: no CLIP score; --clip {clip.DEFAULT_NAME} gives one")
    return lines


def _text_notes(metrics: Mapping[str, Any]) -> list[str]:
    """Sentences on the metrics of open answers: what ROUGE cannot read, and which CLIP score is printed."""
    metrics = metrics.get("answers", metrics)
    sentences = text_metrics.describe_unread(metrics.get("rouge_unread", {}))
    if (clamped_mean := metrics.get("clip_score", {}).get("clamped_mean")) is not None:
        sentences.append(
            "CLIP score is mean_of_clamped, the mean of 100 × max(cosine, 0) of every pair; clamped_mean, which "
            f"torchmetrics computes, is {clamped_mean:.1f}"
        )
    return sentences


_DIFFERENCE_KEYS = {
    "accuracy": "accuracy",
    "perception": "perception",
    "cognition": "cognition",
    "pairwise accuracy, sum": "pairwise_sum",
    "pairwise accuracy, mean": "pairwise_mean",
    "ROUGE-L": "rougeL",
    "exact match": "exact",
    "CLIP score": "clip_score",
}


def _format_metrics(metrics: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a data set: name → value with its interval."""
    if metrics.get("judge") == "mme":
        subtasks = {f"· {name}": f"{values['score']:.2f}" for name, values in metrics["subtasks"].items()}
        return _format_totals(metrics) | subtasks
    if metrics.get("judge") == "rewardbench":
        accuracies = {
            f"pairwise accuracy, {kind}": terminal.format_accuracy(metrics[f"likelihood_{kind}"]["pooled"])
            for kind in ("sum", "mean")
        }
        judgments = metrics.get("judgments", metrics.get("judgements"))  # the name in older records
        if judgments is not None:
            accuracies["accuracy of judgments"] = terminal.format_accuracy(judgments["pooled"])
        return accuracies | _format_texts(metrics["answers"])
    if metrics["method"] == "generation":
        return _format_texts(metrics)
    return {"accuracy": terminal.format_accuracy(metrics)}


def _format_totals(metrics: Mapping[str, Any]) -> dict[str, str]:
    """MME's totals with the most that they can be, each only if one of its subtasks has questions."""
    totals = {"perception": PERCEPTION, "cognition": COGNITION}
    counts = {name: len(set(subtasks) & metrics["subtasks"].keys()) for name, subtasks in totals.items()}
    return {name: f"{metrics[name]:.2f} of {MAX_SCORE * count}" for name, count in counts.items() if count}


def _format_texts(metrics: Mapping[str, Any]) -> dict[str, str]:
    rouge = metrics["texts"]["rougeL"]
    values = {"ROUGE-L": terminal.format_interval(rouge["mean"], rouge["interval"], 100)}
    if "clip_score" in metrics:
        score = metrics["clip_score"]
        values["CLIP score"] = terminal.format_interval(score["mean"], score["interval"])
    return values | {"exact match": terminal.format_accuracy(metrics)}


def _format_difference(difference: Mapping[str, Any] | None) -> str:
    if not difference or difference["difference"] is None:
        return ""
    if difference["interval"] is None:
        return f"{difference['difference']:+.2f}"
    low, high = difference["interval"]
    return f"{difference['difference']:+.1f} [{low:+.1f}–{high:+.1f}]"
