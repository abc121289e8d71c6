"""How cost grows: experiments in a bank, text tokens, candidates, images. Planned memory beside the time."""

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
from blipfit.training import trial

SIZES = (1, 2, 4, 8, 16, 32)
TEXTS = (16, 32, 64, 128)
CANDIDATES = (2, 4, 8, 16)
IMAGES = (128, 256, 512, 1024)
TOGETHER = 8
"""Experiments in the bank whose other costs are looked at."""


def run(rounds: int = 3) -> dict[str, Any]:
    """Both families: seconds and bytes along every axis."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "icons"
        icons.prepare(data, train=max(IMAGES), val=64, test=16)
        for family, first in measure.LORA:
            print(f"\n{family} miniature")
            found[family] = _family(first, data, Path(folder), rounds)
    measure.keep(f"growth-{measure.KIND}", found)
    return found


def spread(first: int, size: int) -> list[Recipe]:
    """So many experiments of a family: its sixteen with LoRA, evenly spread, and again where that is too few."""
    return [grid.recipe("icons", first + i * max(1, 16 // size) % 16, "tiny") for i in range(size)]


def _family(first: int, data: Path, folder: Path, rounds: int) -> dict[str, Any]:
    one = grid.recipe("icons", first, "tiny")
    backbone = loading.load(one.model, device=measure.DEVICE)
    train, val = (encoded_split.load(backbone.text, one.data, data, split) for split in ("train", "val"))
    image_features = ImageFeatures.from_backbone(backbone, "off")
    together = spread(first, TOGETHER)

    def steps(recipes: Sequence[Recipe], read: EncodedSplit) -> dict[str, float]:
        tried = trial.measure(backbone, recipes, read, image_features)
        assert tried is not None
        return {"seconds": tried.seconds_each, "bytes": tried.memory}

    def ranked(count: int) -> dict[str, float]:
        chosen = _changed(val, lambda e: dataclasses.replace(e, candidates=[e.target] * count))
        return {
            "seconds": measure.seconds(lambda: bank.rank(backbone, together, chosen, image_features))
            / TOGETHER
            / len(val)
        }

    return {
        "experiments": _grown(
            "a step, an experiment's share", SIZES, rounds, lambda size: steps(spread(first, size), train)
        ),
        "text tokens": _grown(
            "a step, an experiment's share", TEXTS, rounds, lambda size: steps(together, _changed(train, _long(size)))
        ),
        "candidates": _grown("judging a question, an experiment's share", CANDIDATES, rounds, ranked),
        "images": _grown(
            "storing an image's features", IMAGES, rounds, lambda size: _stored(backbone, train, size, folder)
        ),
    }


def _grown(
    what: str, sizes: Sequence[int], rounds: int, one: Callable[[int], Mapping[str, float]]
) -> dict[str, dict[str, Any]]:
    """What every size costs, the sizes in turn; printed and returned."""
    rows: dict[str, dict[str, Any]] = {str(size): {"seconds": []} for size in sizes}
    one(sizes[0])
    for _ in range(rounds):
        for size in sizes:
            cost = one(size)
            rows[str(size)]["seconds"].append(cost["seconds"])
            if "bytes" in cost:
                rows[str(size)]["bytes"] = cost["bytes"]
    for size, row in rows.items():
        times = sorted(row["seconds"])
        memory = f"{row['bytes'] / 2**20:8.0f} MiB" if "bytes" in row else ""
        print(
            f"  {size:>5} → {what}: {1000 * times[len(times) // 2]:7.2f} ms "
            f"[{1000 * times[0]:.2f}–{1000 * times[-1]:.2f}]{memory}",
            flush=True,
        )
    return rows


def _changed(read: EncodedSplit, change: Callable[[Any], Any]) -> EncodedSplit:
    return dataclasses.replace(read, encoded=[change(one) for one in read.encoded])


def _long(tokens: int) -> Callable[[Any], Any]:
    """Makes a question's text so long, by saying it again."""

    def again(ids: list[int]) -> list[int]:
        return (ids * (tokens // len(ids) + 1))[:tokens]

    return lambda e: dataclasses.replace(
        e, qformer=again(e.qformer), prompt=again(e.prompt), prompt_cut=again(e.prompt_cut)
    )


def _stored(backbone: Backbone, train: EncodedSplit, count: int, folder: Path) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=folder) as store:
        image_features = ImageFeatures.from_backbone(backbone, "stored", Path(store))
        return {"seconds": measure.seconds(lambda: image_features.prepare(train.questions[:count])) / count}
