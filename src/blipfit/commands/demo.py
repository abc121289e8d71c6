"""`blipfit demo`: a miniature InstructBLIP learns what it could not do, before your eyes."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data, grid, run
from blipfit.data import encoded_split
from blipfit.data.images import open_image
from blipfit.evaluation import evaluate, ranking
from blipfit.model import loading
from blipfit.recipe import Recipe
from blipfit.report import pictures, terminal
from blipfit.training.loop import train

EXPERIMENTS = (60, 64)
"""LoRA in the whole Q-Former; LoRA in the Q-Former and the language model. Both rank 8, on the Vicuna miniature."""
SIZES = {"train": 3200, "val": 100, "test": 300}
OVERRIDES = ("training.max_epochs=4", "training.patience=4", "training.learning_rate=2e-3")
SHOWN = ("odd", "compare", "ordinal")


def recipes() -> list[Recipe]:
    return [grid.recipe("icons", number, "tiny").override(OVERRIDES) for number in EXPERIMENTS]


def run_demo(folder: Path, device: torch.device, seed: int = 42) -> dict[str, Any]:
    """Draw pictures, ask the base model, fine-tune two experiments in one bank, ask again; return all figures."""
    started = time.monotonic()
    screen = terminal.console(stderr=True)
    source = folder / "data"
    data.prepare("icons", source, **SIZES, seed=seed)
    chosen = recipes()
    backbone = loading.load(chosen[0].model, device=device)
    test = encoded_split.load(backbone.text, chosen[0].data, source, "test")
    picked = [next(i for i, q in enumerate(test.questions) if q.tags["skill"] == skill) for skill in SHOWN]
    images = [open_image(test.questions[i].image) for i in picked]
    screen.print("Three pictures, each with a kind of question that this miniature InstructBLIP was never asked:\n")
    if screen.is_terminal:
        screen.print(pictures.in_terminal(images))
    answers = {"base": evaluate.answers(backbone, chosen[0], test, evaluate.evaluation_features(backbone, chosen[0]))}
    for i in picked:
        question = test.questions[i]
        screen.print(f"  {question.question}  ({', '.join(question.choices)})", soft_wrap=True)
    screen.print(f"\nThe base model says: {_said(answers['base'], picked)}\n", soft_wrap=True)
    before = ranking.summarize(test.questions, answers["base"])
    screen.print(
        f"Right on {before['questions']} such questions: {terminal.percent(before)} %, chance {before['chance']}"
    )
    screen.print("Now it learns them: two experiments in one pass over one frozen model.\n")
    runs = train(chosen, source, folder, device=device, listen=terminal.TrainingDisplay())
    records = [one.result() for one in runs]
    for one, record in zip(runs, records, strict=True):
        answers[record["experiment"]] = [r for r in run.read_lines(one.predictions_file) if r["split"] == "test"]
        screen.print(f"\nExperiment {record['experiment']} says: {_said(answers[record['experiment']], picked)}")
    sheet = folder / "pictures.png"
    captions = [_caption(test, answers, i) for i in picked]
    with run.replacing(sheet) as temporary:
        pictures.contact_sheet(images, captions).save(temporary, format="PNG")
    return {
        "before": before,
        "results": records,
        "pictures": str(sheet),
        "folders": [str(one.folder) for one in runs],
        "seconds": round(time.monotonic() - started, 1),
    }


def ending(record: Mapping[str, Any]) -> list[Any]:
    """The table, where everything lies, and what to type next."""
    table = Table(title="accuracy on the new skills, fresh pictures (95 % interval)", title_justify="left")
    table.add_column("model")
    for name in ("accuracy", "trained parameters", "share", "time"):
        table.add_column(name, justify="right")
    before = record["before"]
    skills = sorted(before["by"]["skill"])
    kinds = Table(title="the same, by kind of question (per cent)", title_justify="left")
    kinds.add_column("model")
    for skill in skills:
        kinds.add_column(skill, justify="right")
    tuned = {f"experiment {result['experiment']}": result["metrics"]["test"] for result in record["results"]}
    for label, metrics in {"miniature as shipped": before, **tuned}.items():
        kinds.add_row(label, *(f"{metrics['by']['skill'][skill]['accuracy']:.0f}" for skill in skills))
    table.add_row("chance", f"{before['chance']:.1f}", "", "", "")
    table.add_row("miniature as shipped", terminal.percent(before), "0", "", "")
    for result in record["results"]:
        table.add_row(
            f"experiment {result['experiment']}: {terminal.placement(result['recipe']['adapter'])}",
            terminal.percent(result["metrics"]["test"]),
            f"{result['trained_parameters']:,}",
            f"{100 * result['trained_share']:.2f} %",
            terminal.duration(result["seconds"]),
        )
    return [
        table,
        kinds,
        f"the pictures with all answers: {record['pictures']}",
        f"run folders: {', '.join(record['folders'])}   (whole demo: {terminal.duration(record['seconds'])})",
        "",
        "Next, with real questions and the real model (a GPU, ScienceQA downloaded):",
        "  blipfit show scienceqa 28",
        "  blipfit prepare scienceqa --from hub --to data/scienceqa",
        "  blipfit train scienceqa 28",
    ]


def _said(records: list[dict[str, Any]], picked: list[int]) -> str:
    return "   ".join(f"{records[i]['prediction']} {'✓' if records[i]['correct'] else '✗'}" for i in picked)


def _caption(test: encoded_split.EncodedSplit, answers: Mapping[str, list[dict[str, Any]]], i: int) -> str:
    question = test.questions[i]
    lines = [f"{name}: {records[i]['prediction']}" for name, records in answers.items()]
    return "\n".join([question.question, f"right: {question.answer}", *lines])
