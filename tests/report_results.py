"""Result files for tests of the report: copies of a finished run's files with other recipes and numbers."""

import copy
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import blipfit
from blipfit import grid
from blipfit.evaluation.metrics import accuracy
from blipfit.recipe import Recipe
from blipfit.run_folder import Run, read_json, read_lines, write_json, write_lines, write_text

EPOCHS = 4
PUBLISHED = Path(blipfit.__file__).parent / "report" / "published.json"


def copy_run(source: Run, results: Path, recipe: Recipe, seed: int = 0, percent: float = 60) -> Run:
    """Write a finished run of a recipe with the fields of `source`, random losses, `percent` right on average."""
    noise = random.Random(f"{recipe.title} {seed}")
    result = copy.deepcopy(read_json(source.result_file))
    run = Run.of(results, recipe).create()
    lines = read_lines(source.predictions_file)
    for line in lines:
        texts = [candidate["text"] for candidate in line["candidates"]]
        line["correct"] = noise.random() < percent / 100
        wrong = [text for text in texts if text != line["answer"]]
        line["prediction"] = line["answer"] if line["correct"] else noise.choice(wrong)
    for split, metrics in result["metrics"].items():
        correct = [noise.random() < percent / 100 for _ in range(500)]
        result["metrics"][split] = {**metrics, **accuracy(correct)}
    history = [_log_line(noise, epoch) for epoch in range(EPOCHS)]
    result |= {
        "experiment": recipe.experiment,
        "dataset": recipe.data.name,
        "best_epoch": 2,
        "epochs": EPOCHS,
        "trained_parameters": noise.randrange(20_000, 1_200_000),
        "trained_share": noise.uniform(0.001, 0.4),
        "seconds": round(noise.uniform(10, 9000), 3),
        "history": history,
        "differs_from_published": {},
        "recipe": recipe.model_dump(mode="json"),
    }
    write_text(run.recipe_file, recipe.to_yaml())
    write_lines(run.log_file, history)
    write_lines(run.predictions_file, lines)
    write_json(run.result_file, result)
    return run


def _log_line(noise: random.Random, epoch: int) -> dict[str, Any]:
    loss, score = noise.uniform(0.5, 2) / (epoch + 1), noise.uniform(40, 80)
    return {"epoch": epoch + 1, "loss": loss, "val_accuracy": score, "learning_rate": 5e-4, "seconds": 1.5}


def copy_grid(source: Run, results: Path, datasets: Sequence[str], numbers: Sequence[int]) -> list[Run]:
    """Write finished runs of the grid's recipes of the published models."""
    return [
        copy_run(source, results, grid.recipe(dataset, number), percent=60 + number % 30)
        for dataset in datasets
        for number in numbers
    ]


def resolve(source: str) -> Any:
    """The value at `FILE#/JSON/POINTER`; in a `.jsonl` file the first part is the line."""
    file, _, pointer = source.partition("#")
    path = PUBLISHED if file == PUBLISHED.name else Path(file)
    value: Any = read_lines(path) if path.suffix == ".jsonl" else json.loads(path.read_text(encoding="utf-8"))
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        value = value[int(key)] if isinstance(value, list) else value[key]
    return value
