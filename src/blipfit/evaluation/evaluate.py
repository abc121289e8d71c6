"""Judge a finished run again, from its files."""

from pathlib import Path
from typing import Any

import torch

from blipfit.adapters import peft_format
from blipfit.errors import UserError
from blipfit.evaluation import judging, material
from blipfit.evaluation.material import Material
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.sight import Sight
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
    chosen = material.read(backbone, recipe.data, data, split)
    sight = judging_sight(backbone, recipe)
    facts: dict[str, Any] = {"run": str(folder), "experiment": recipe.title, "split": split}
    if base:
        facts["base"] = summary(backbone, recipe, chosen, sight)
    bank, digest = peft_format.install(backbone, run.adapter)
    try:
        if digest != recorded["adapter_sha256"]:
            raise UserError(f"{run.adapter} is not the adapter that {run.result_file} was made with; train it again")
        facts["tuned"] = summary(backbone, recipe, chosen, sight)
    finally:
        bank.remove()
    facts["adapter_sha256"] = digest
    facts["recorded"] = recorded["metrics"].get(split, {}).get("accuracy")
    return facts


def summary(backbone: Backbone, recipe: Recipe, chosen: Material, sight: Sight) -> dict[str, Any]:
    """Judge a split with what is installed in the backbone (a bank of one, or nothing)."""
    (judged,) = judging.judge(backbone, chosen, sight.features, recipe.judging)
    return judged.metrics


def answers(backbone: Backbone, recipe: Recipe, chosen: Material, sight: Sight) -> list[dict[str, Any]]:
    """Prediction records of a split, in its order."""
    (judged,) = judging.judge(backbone, chosen, sight.features, recipe.judging)
    return judged.records


def judging_sight(backbone: Backbone, recipe: Recipe, store: Path | None = None) -> Sight:
    """Where a recipe's validation and test features come from: they never change, so the store unless it is off."""
    return Sight.from_backbone(backbone, "off" if recipe.data.images == "off" else "stored", store)
