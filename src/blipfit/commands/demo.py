"""`blipfit demo`: a miniature InstructBLIP learns four new kinds of questions."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from blipfit import data, grid, run_folder
from blipfit.commands import report
from blipfit.data import encoded_split
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.images import open_image
from blipfit.evaluation import evaluate_split, ranking
from blipfit.model import loading
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.report import image_sheet, terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.run_folder import Evaluation, read_lines, replacing
from blipfit.training.loop import train

EXPERIMENTS = (60, 64)
"""LoRA in the whole Q-Former; LoRA in the Q-Former and the language model. Both rank 8, on the Vicuna miniature."""
SIZES = {"train": 3200, "val": 100, "test": 300}
OVERRIDES = ("training.max_epochs=4", "training.patience=4", "training.learning_rate=2e-3")
EXAMPLE_SKILLS = ("odd", "compare", "ordinal")
"""Kinds of questions of which one example each is printed."""


def recipes() -> list[Recipe]:
    """The recipes of the demo's experiments."""
    return [grid.recipe("icons", number, "tiny").override(OVERRIDES) for number in EXPERIMENTS]


def run(folder: Path, device: torch.device, seed: int = 42) -> dict[str, Any]:
    """Draw images, evaluate the base model, fine-tune two experiments in one bank, evaluate again."""
    started = time.monotonic()
    screen = terminal.console(stderr=True)
    source = folder / "data"
    data.prepare("icons", source, **SIZES, seed=seed)
    first = recipes()[0]
    backbone = loading.load(first.model, device=device)
    test = encoded_split.load(backbone.text, first.data, source, "test")
    examples = [next(i for i, q in enumerate(test.questions) if q.tags["skill"] == skill) for skill in EXAMPLE_SKILLS]
    images = [open_image(test.questions[i].image) for i in examples]
    screen.print("Three images, each with a kind of question that this miniature InstructBLIP was never trained on:\n")
    if screen.is_terminal:
        screen.print(image_sheet.in_terminal(images))
    features = ImageFeatures.for_evaluation(backbone, first.data.images).features
    (evaluation,) = evaluate_split.evaluate_split(backbone, test, features, first.evaluation)
    evaluation.require_finite()
    predictions = {"base": evaluation.records}
    for i in examples:
        question = test.questions[i]
        screen.print(f"  {question.question}  ({', '.join(question.choices)})", soft_wrap=True)
    screen.print(f"\nThe base model answers: {_format_answers(predictions['base'], examples)}\n", soft_wrap=True)
    before = ranking.summarize(test.questions, predictions["base"])
    _write_base_evaluation(folder, backbone.name, before, predictions["base"])
    accuracy = terminal.format_accuracy(before)
    screen.print(f"Its accuracy on {before['questions']} such questions: {accuracy} %, chance {before['chance']:.1f} %")
    screen.print("Now it learns them: two experiments in one pass over one frozen model.\n")
    with TrainingDisplay() as display:
        runs = train(recipes(), source, folder, device=device, listener=display)
    results = [finished.result() for finished in runs]
    for finished, result in zip(runs, results, strict=True):
        name = result["experiment"]
        predictions[name] = [line for line in read_lines(finished.predictions_file) if line["split"] == "test"]
        screen.print(f"\nExperiment {name} answers: {_format_answers(predictions[name], examples)}")
    pictures = _write_sheet(folder / "pictures.png", images, test, predictions, examples)
    return {
        "before": before,
        "results": results,
        "pictures": str(pictures),
        "report": report.run([folder], folder / "report.html")["to"],
        "folders": [str(finished.folder) for finished in runs],
        "seconds": round(time.monotonic() - started, 1),
    }


def render(record: Mapping[str, Any]) -> list[Any]:
    """Accuracies and costs, accuracies by kind of question, where the files are, and what to run next."""
    return [
        _accuracy_table(record),
        _skill_table(record),
        f"the images with all answers: {record['pictures']}",
        f"the report of these results: open {record['report']} in a browser",
        f"run folders: {', '.join(record['folders'])}   (whole demo: {terminal.format_duration(record['seconds'])})",
        "",
        "Next, with real questions and the real model (needs a GPU and a download of ScienceQA):",
        "  blipfit show scienceqa 28",
        "  blipfit prepare scienceqa --from hub --to data/scienceqa",
        "  blipfit train scienceqa 28",
    ]


def _write_base_evaluation(
    folder: Path, model: str, metrics: Mapping[str, Any], predictions: Sequence[Mapping[str, Any]]
) -> None:
    """Write the base model's accuracy where `blipfit evaluate MODEL --on icons` would, for the report."""
    evaluation = Evaluation.of_model(folder, model, "icons-test")
    run_folder.write_lines(evaluation.predictions_file, [{"who": "base", **line} for line in predictions])
    record = {"on": "icons", "split": "test", "questions": metrics["questions"], "model": model, "run": None}
    run_folder.write_json(evaluation.record_file, {**record, "base": metrics})


def _accuracy_table(record: Mapping[str, Any]) -> Table:
    table = Table(title="accuracy on new images (%, with 95 % interval)", title_justify="left")
    table.add_column("model")
    for name in ("accuracy", "trained parameters", "share", "time"):
        table.add_column(name, justify="right")
    before = record["before"]
    table.add_row("chance", f"{before['chance']:.1f}", "", "", "")
    table.add_row("base model", terminal.format_accuracy(before), "0", "", "")
    for result in record["results"]:
        table.add_row(
            f"experiment {result['experiment']}: {terminal.format_placement(result['recipe']['adapter'])}",
            terminal.format_accuracy(result["metrics"]["test"]),
            f"{result['trained_parameters']:,}",
            f"{100 * result['trained_share']:.2f} %",
            terminal.format_duration(result["seconds"]),
        )
    return table


def _skill_table(record: Mapping[str, Any]) -> Table:
    skills = sorted(record["before"]["by"]["skill"])
    table = Table(title="accuracy by kind of question (%)", title_justify="left")
    table.add_column("model")
    for skill in skills:
        table.add_column(skill, justify="right")
    tuned = {f"experiment {result['experiment']}": result["metrics"]["test"] for result in record["results"]}
    for label, metrics in {"base model": record["before"], **tuned}.items():
        table.add_row(label, *(f"{metrics['by']['skill'][skill]['accuracy']:.0f}" for skill in skills))
    return table


def _format_answers(predictions: Sequence[Mapping[str, Any]], indices: Sequence[int]) -> str:
    return "   ".join(f"{predictions[i]['prediction']} {'✓' if predictions[i]['correct'] else '✗'}" for i in indices)


def _write_sheet(
    file: Path,
    images: Sequence[Image.Image],
    test: EncodedSplit,
    predictions: Mapping[str, Sequence[Mapping[str, Any]]],
    indices: Sequence[int],
) -> Path:
    """Write a contact sheet of the images, each with its question, the right answer and all models' answers."""
    captions = []
    for i in indices:
        question = test.questions[i]
        answers = [f"{name}: {lines[i]['prediction']}" for name, lines in predictions.items()]
        captions.append("\n".join([question.question, f"right: {question.answer}", *answers]))
    with replacing(file) as temporary:
        image_sheet.contact_sheet(images, captions).save(temporary, format="PNG")
    return file
