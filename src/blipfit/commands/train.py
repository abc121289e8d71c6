"""`blipfit train`: experiments trained, evaluated and recorded."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from blipfit.commands import resolve_arguments
from blipfit.evaluation import text_metrics
from blipfit.recipe import Recipe
from blipfit.report import terminal
from blipfit.report.progress import TrainingDisplay
from blipfit.run_folder import Run
from blipfit.runtime.save_interval import SaveInterval
from blipfit.training.loop import train


def run(
    recipes: Sequence[Recipe],
    data: Path | None,
    results: Path,
    device: torch.device,
    save_interval: SaveInterval | None = None,
) -> dict[str, Any]:
    """Train all recipes, which read one data set; finished runs are skipped, interrupted ones continue.

    Raises UserError before anything is trained if the data, a model or a run folder does not fit.
    """
    folder = resolve_arguments.data_folder(recipes[0].data.name, data)
    with TrainingDisplay() as display:
        runs = train(recipes, folder, results, device=device, listener=display, save_interval=save_interval)
    return summarize(runs)


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """Results of the finished runs, reasons of the others, and all folders."""
    return {
        "results": [run.result() for run in runs if run.state() == "finished"],
        "failed": {str(run.folder): run.failure() for run in runs if run.state() != "finished"},
        "folders": [str(run.folder) for run in runs],
    }


def render(record: Mapping[str, Any]) -> list[Any]:
    """The leaderboard columns, the failures, and where the run folders are."""
    results = record["results"]
    lines: list[Any] = []
    if results:
        lines.append(terminal.results_table(results))
        lines += terminal.leaderboard_tables(results)
        unread = [text_metrics.describe_unread(result["metrics"]["test"].get("rouge_unread", {})) for result in results]
        lines += dict.fromkeys(sentence for sentences in unread for sentence in sentences)
    else:
        lines.append("no experiment was finished")
    lines += [f"failed: {folder}: {reason}" for folder, reason in record["failed"].items()]
    return [*lines, "run folders: " + ", ".join(record["folders"])]
