"""Measures how time and memory grow with the experiments in a bank, text tokens, candidates and images."""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import bank, measure
from blipfit import grid
from blipfit.data import encoded_split, icons
from blipfit.data.encoded_split import EncodedSplit
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.training import bank_trials

BANK_SIZES = (1, 2, 4, 8, 16, 32)
TEXT_TOKENS = (16, 32, 64, 128)
CANDIDATES = (2, 4, 8, 16)
IMAGES = (128, 256, 512, 1024)
FIXED_BANK_SIZE = 8
"""Experiments in the bank for text tokens and candidates."""


def run(rounds: int = 3) -> dict[str, Any]:
    """Measure both families; writes and returns seconds and bytes along every axis."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=max(IMAGES), val=64, test=16)
        for family, first in measure.FIRST_LORA:
            print(f"\n{family} miniature")
            results[family] = _measure_family(first, data, Path(folder), rounds)
    measure.write_results(f"growth-{measure.MACHINE_KIND}", results)
    return results


def select_recipes(first: int, size: int) -> list[Recipe]:
    """Select `size` experiments, evenly spaced among the sixteen with LoRA from id `first` on, repeated if too few."""
    return [grid.recipe("icons", first + i * max(1, 16 // size) % 16, "tiny") for i in range(size)]


def _measure_family(first: int, data: Path, folder: Path, rounds: int) -> dict[str, Any]:
    recipe = grid.recipe("icons", first, "tiny")
    backbone = loading.load(recipe.model, device=measure.DEVICE)
    train, val = (encoded_split.load(backbone.text, recipe.data, data, split) for split in ("train", "val"))
    image_features = ImageFeatures.from_backbone(backbone, "off")
    bank_recipes = select_recipes(first, FIXED_BANK_SIZE)

    def measure_step(recipes: Sequence[Recipe], split: EncodedSplit) -> dict[str, float]:
        result = bank_trials.measure(backbone, recipes, split, image_features)
        assert result is not None
        return {"seconds": result.seconds_each, "bytes": result.memory}

    def measure_ranking(count: int) -> dict[str, float]:
        split = _map_questions(val, lambda e: dataclasses.replace(e, candidates=[e.target] * count))
        return {
            "seconds": measure.time_once(lambda: bank.rank(backbone, bank_recipes, split, image_features))
            / FIXED_BANK_SIZE
            / len(val)
        }

    return {
        "experiments": _measure_axis(
            "a step, per experiment", BANK_SIZES, rounds, lambda size: measure_step(select_recipes(first, size), train)
        ),
        "text tokens": _measure_axis(
            "a step, per experiment",
            TEXT_TOKENS,
            rounds,
            lambda size: measure_step(bank_recipes, _map_questions(train, _set_length(size))),
        ),
        "candidates": _measure_axis("ranking a question, per experiment", CANDIDATES, rounds, measure_ranking),
        "images": _measure_axis(
            "storing an image's features", IMAGES, rounds, lambda size: _measure_storing(backbone, train, size, folder)
        ),
    }


def _measure_axis(
    title: str, sizes: Sequence[int], rounds: int, measure_size: Callable[[int], Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """Measure the sizes in turn, `rounds` times; prints and returns the seconds and bytes of every size."""
    rows: dict[str, dict[str, Any]] = {str(size): {"seconds": []} for size in sizes}
    measure_size(sizes[0])  # warms up
    for _ in range(rounds):
        for size in sizes:
            cost = measure_size(size)
            rows[str(size)]["seconds"].append(cost["seconds"])
            if "bytes" in cost:
                rows[str(size)]["bytes"] = cost["bytes"]
    for label, row in rows.items():
        times = sorted(row["seconds"])
        memory = f"{row['bytes'] / 2**20:8.0f} MiB" if "bytes" in row else ""
        print(
            f"  {label:>5} → {title}: {1000 * times[len(times) // 2]:7.2f} ms "
            f"[{1000 * times[0]:.2f}–{1000 * times[-1]:.2f}]{memory}",
            flush=True,
        )
    return rows


def _map_questions(split: EncodedSplit, change: Callable[[Any], Any]) -> EncodedSplit:
    return dataclasses.replace(split, encoded=[change(question) for question in split.encoded])


def _set_length(tokens: int) -> Callable[[Any], Any]:
    """Return a function that repeats the text of an encoded question until it has this number of tokens."""

    def repeat(ids: list[int]) -> list[int]:
        return (ids * (tokens // len(ids) + 1))[:tokens]

    return lambda e: dataclasses.replace(
        e,
        qformer=repeat(e.qformer),
        evaluation_prompt=repeat(e.evaluation_prompt),
        training_prompt=repeat(e.training_prompt),
    )


def _measure_storing(backbone: Backbone, train: EncodedSplit, count: int, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        image_features = ImageFeatures.from_backbone(backbone, "stored", Path(store))
        return {"seconds": measure.time_once(lambda: image_features.prepare(train.questions[:count])) / count}
