"""`blipfit features`: the stored image features, looked after."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from blipfit import data
from blipfit.commands import arguments as experiments
from blipfit.data import feature_stores, features
from blipfit.data.question import SPLITS
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.report import terminal

ACTIONS = ("list", "build", "check", "delete")


def act(
    action: str,
    key: str | None,
    dataset: str | None,
    folder: Path | None,
    model: str,
    store: Path | None,
    device: torch.device | None,
) -> dict[str, Any]:
    """Do one of ACTIONS and return what was found."""
    home = store or features.default_folder()
    if action == "list":
        return {"folder": str(home), "stores": [_plain(one) for one in feature_stores.list_stores(home)]}
    if action == "delete":
        if key is None:
            raise UserError("say which store: `blipfit features delete KEY`; `blipfit features list` shows the keys")
        found = feature_stores.find(home, key)
        return {"deleted": found.name, "freed": features.told(feature_stores.delete(found))}
    if action not in ACTIONS:
        raise UserError(f"unknown action {action!r}; known: {', '.join(ACTIONS)}")
    if action == "check" and dataset is None:
        return {"checked": [_checked(one.home) for one in feature_stores.list_stores(home)]}
    if dataset is None:
        raise UserError(f"say which data set: `blipfit features {action} --on scienceqa`")
    return _with_model(action, dataset, folder, model, home, device)


def _with_model(
    action: str, dataset: str, folder: Path | None, model: str, home: Path, device: torch.device | None
) -> dict[str, Any]:
    screen = terminal.console(stderr=True)
    source = experiments.data_folder(dataset, folder)
    questions = [question for split in SPLITS for question in data.load(dataset, source, split)]
    backbone = loading.load(ModelConfig(name=model), device=device or "cpu")
    image_features = ImageFeatures.from_backbone(
        backbone, "stored", home, lambda text: screen.print(text, soft_wrap=True)
    )
    if action == "build":
        return {"built": image_features.prepare(questions), "questions": len(questions), "folder": str(home)}
    return {"compared": asdict(image_features.check(questions))}


def _checked(home: Path) -> dict[str, Any]:
    found = feature_stores.check(home)
    return {"store": home.name, "images": found.images, "damaged": {str(p): why for p, why in found.damaged.items()}}


def _plain(one: feature_stores.Description) -> dict[str, Any]:
    return {**asdict(one), "home": str(one.home), "key": one.key}


def table(record: Mapping[str, Any]) -> list[Any]:
    if "stores" not in record:
        return [f"{name}: {value}" for name, value in record.items()]
    shown = Table(title=f"image features in {record['folder']}", title_justify="left")
    for name in ("key", "model", "images", "shape", "type", "size", "damaged"):
        shown.add_column(name, justify="left" if name in ("key", "model") else "right")
    for one in record["stores"]:
        shape = "×".join(map(str, one["shape"]))
        size = features.told(one["bytes"])
        shown.add_row(
            one["key"], one["model"], f"{one['images']:,}", shape, one["dtype"], size, str(len(one["damaged"]))
        )
    return [shown]
