"""`blipfit features`: list, build, check or delete stored image features."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data, grid
from blipfit.commands import resolve_arguments
from blipfit.data import feature_store, manage_feature_stores
from blipfit.data.question import SPLITS
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.report import terminal

ACTIONS = ("list", "build", "check", "delete")


def run(
    action: str,
    key: str | None,
    dataset: str | None,
    folder: Path | None,
    model: str,
    store: Path | None,
    device: torch.device | None,
) -> dict[str, Any]:
    """Do one of `ACTIONS`. Raises UserError if the action, store, data set or model does not exist."""
    home = store or feature_store.default_folder()
    if action == "list":
        stores = [_store_record(summary) for summary in manage_feature_stores.list_stores(home)]
        return {"folder": str(home), "stores": stores}
    if action == "delete":
        if key is None:
            raise UserError("say which store: `blipfit features delete KEY`; `blipfit features list` shows the keys")
        store_folder = manage_feature_stores.find(home, key)
        return {
            "deleted": store_folder.name,
            "freed": feature_store.format_bytes(manage_feature_stores.delete(store_folder)),
        }
    if action not in ACTIONS:
        raise UserError(f"unknown action {action!r}; known: {', '.join(ACTIONS)}")
    if action == "check" and dataset is None:
        return {"checked": [_check(summary.home) for summary in manage_feature_stores.list_stores(home)]}
    if dataset is None:
        raise UserError(f"say which data set: `blipfit features {action} --on scienceqa`")
    return _with_model(action, dataset, folder, model, home, device)


def _with_model(
    action: str, dataset: str, folder: Path | None, model: str, home: Path, device: torch.device | None
) -> dict[str, Any]:
    screen = terminal.console(stderr=True)
    source = resolve_arguments.data_folder(dataset, folder)
    splits = ("test",) if dataset == "mme" else SPLITS
    questions = [question for split in splits for question in data.load(dataset, source, split)]
    backbone = loading.load(ModelConfig(name=grid.model_name("t5", model)), device=device or "cpu")
    image_features = ImageFeatures.from_backbone(
        backbone, "stored", home, lambda text: screen.print(text, soft_wrap=True)
    )
    if action == "build":
        return {"built": image_features.prepare(questions), "questions": len(questions), "folder": str(home)}
    return {"compared": asdict(image_features.check(questions))}


def _check(store_folder: Path) -> dict[str, Any]:
    summary = manage_feature_stores.check(store_folder)
    damaged = {str(path): reason for path, reason in summary.damaged.items()}
    return {"store": store_folder.name, "images": summary.images, "damaged": damaged}


def _store_record(summary: manage_feature_stores.StoreSummary) -> dict[str, Any]:
    return {**asdict(summary), "home": str(summary.home), "key": summary.key}


def _sentences(record: Mapping[str, Any]) -> list[str]:
    """What was deleted, built, checked or compared."""
    if "deleted" in record:
        return [f"deleted {record['deleted']}, which took {record['freed']}"]
    if "built" in record:
        images = terminal.format_count(record["built"], "image")
        questions = terminal.format_count(record["questions"], "question")
        return [f"computed the features of {images}, for {questions}, in {record['folder']}"]
    if "compared" in record:
        return _describe_comparison(record["compared"])
    lines = []
    for store in record["checked"]:
        images = terminal.format_count(store["images"], "image")
        lines.append(f"{store['store']}: every byte of {images} is as it was written")
        lines += [f"  damaged: {path}: {reason}" for path, reason in store["damaged"].items()]
        if store["damaged"]:
            lines[-1] += "; delete the file, and the next build computes its images again"
    return lines or ["there is no feature store"]


def _describe_comparison(compared: Mapping[str, Any]) -> list[str]:
    images = terminal.format_count(compared["images"], "image")
    if not compared["images"]:
        return ["no features of these images are stored; `blipfit features build` computes them"]
    if not compared["different"]:
        return [f"computed the features of {images} again: equal to the stored ones in every bit"]
    return [
        f"computed the features of {images} again: {len(compared['different'])} differ, by at most "
        f"{compared['largest']:.3g}; images by their hash: {', '.join(compared['different'][:5])}"
        + (" …" if len(compared["different"]) > 5 else "")
    ]


def render(record: Mapping[str, Any]) -> list[Any]:
    """The table of stores, or sentences on what was done or checked."""
    if "stores" not in record:
        return _sentences(record)
    table = Table(title=f"image features in {record['folder']}", title_justify="left")
    for name in ("key", "model", "images", "shape", "type", "size", "damaged"):
        table.add_column(name, justify="left" if name in ("key", "model") else "right")
    for store in record["stores"]:
        table.add_row(
            store["key"],
            store["model"],
            f"{store['images']:,}",
            "×".join(map(str, store["shape"])),
            store["dtype"],
            feature_store.format_bytes(store["bytes"]),
            str(len(store["damaged"])),
        )
    return [table]
