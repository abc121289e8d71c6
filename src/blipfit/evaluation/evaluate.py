"""Judge a finished run again, from its files."""

from pathlib import Path
from typing import Any

import torch

from blipfit.adapters import peft_format
from blipfit.data import encoded_split
from blipfit.data.encoded_split import EncodedSplit
from blipfit.errors import UserError
from blipfit.evaluation import protocol
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.run import Run


def evaluate(folder: Path, data: Path, split: str, device: torch.device | str, base: bool = False) -> dict[str, Any]:
    """Judge a split with a run's saved adapter, and with the bare model beside it if `base`.

    The adapter's hash must be the one that was recorded with the result.
    """
    run = Run(folder)
    recipe = run.recipe()
    if run.state() != "finished":
        raise UserError(f"{folder} is not finished; run the same `blipfit train` again to continue it")
    recorded = run.result()
    training = recipe.training
    backbone = loading.load(
        recipe.model, training.precision, device, training.max_text_tokens, training.max_target_tokens
    )
    chosen = encoded_split.load(backbone.text, recipe.data, data, split)
    image_features = evaluation_features(backbone, recipe)
    facts: dict[str, Any] = {"run": str(folder), "experiment": recipe.title, "split": split}
    if base:
        facts["base"] = summary(backbone, recipe, chosen, image_features)
    bank, digest = peft_format.install(backbone, run.adapter)
    try:
        if digest != recorded["adapter_sha256"]:
            raise UserError(f"{run.adapter} is not the adapter that {run.result_file} was made with; train it again")
        facts["tuned"] = summary(backbone, recipe, chosen, image_features)
    finally:
        bank.remove()
    facts["adapter_sha256"] = digest
    facts["recorded"] = recorded["metrics"].get(split, {}).get("accuracy")
    return facts


def summary(backbone: Backbone, recipe: Recipe, chosen: EncodedSplit, image_features: ImageFeatures) -> dict[str, Any]:
    """Judge a split with what is installed in the backbone (a bank of one, or nothing)."""
    (judged,) = protocol.evaluate_split(backbone, chosen, image_features.features, recipe.evaluation)
    return judged.metrics


def answers(
    backbone: Backbone, recipe: Recipe, chosen: EncodedSplit, image_features: ImageFeatures
) -> list[dict[str, Any]]:
    """Prediction records of a split, in its order."""
    (judged,) = protocol.evaluate_split(backbone, chosen, image_features.features, recipe.evaluation)
    return judged.records


def evaluation_features(backbone: Backbone, recipe: Recipe, store: Path | None = None) -> ImageFeatures:
    """Where a recipe's validation and test features come from: they never change, so the store unless it is off."""
    return ImageFeatures.from_backbone(backbone, "off" if recipe.data.images == "off" else "stored", store)
