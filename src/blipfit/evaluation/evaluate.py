"""Judge a finished run again, from its files."""

from pathlib import Path
from typing import Any

import torch

from blipfit.adapters import peft_format
from blipfit.errors import UserError
from blipfit.evaluation import material, ranking
from blipfit.evaluation.material import Eyes, Material
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.run import Run


def evaluate(folder: Path, data: Path, split: str, device: torch.device | str, base: bool = False) -> dict[str, Any]:
    """Rank a split with a run's saved adapter, and with the bare model beside it if `base`.

    The adapter's hash must be the one that was recorded with the result.
    """
    run = Run(folder)
    recipe = run.recipe()
    if run.state() != "finished":
        raise UserError(f"{folder} is not finished; run the same `blipfit train` again to continue it")
    recorded = run.result()
    training = recipe.training
    backbone = loading.load(recipe.model, training.precision, device, training.max_text_tokens)
    facts: dict[str, Any] = {"run": str(folder), "experiment": recipe.title, "split": split}
    if base:
        facts["base"] = judge(backbone, recipe, data, split)
    bank, digest = peft_format.install(backbone, run.adapter)
    try:
        if digest != recorded["adapter_sha256"]:
            raise UserError(f"{run.adapter} is not the adapter that {run.result_file} was made with; train it again")
        facts["tuned"] = judge(backbone, recipe, data, split)
    finally:
        bank.remove()
    facts["adapter_sha256"] = digest
    facts["recorded"] = recorded["metrics"].get(split, {}).get("accuracy")
    return facts


def judge(backbone: Backbone, recipe: Recipe, data: Path, split: str) -> dict[str, Any]:
    """Rank a split with what is installed in the backbone (a bank of one, or nothing)."""
    chosen = material.read(backbone, recipe.data, data, split)
    return ranking.summarise(chosen.questions, answers(backbone, recipe, chosen))


def answers(backbone: Backbone, recipe: Recipe, chosen: Material) -> list[dict[str, Any]]:
    """Prediction records of a split, in its order."""
    eyes = Eyes(backbone)
    judged = ranking.rank(
        backbone,
        chosen.encoded,
        lambda indices: eyes.plain([chosen.questions[i] for i in indices]),
        recipe.judging.batch_size,
    )
    return ranking.predictions(chosen.questions, chosen.prompted, judged[0])
