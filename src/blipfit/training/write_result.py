"""The files of a finished run: adapter, predictions, result."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blipfit import grid, run_folder
from blipfit.adapters import peft_format
from blipfit.data.encoded_split import EncodedSplit
from blipfit.errors import UserError
from blipfit.evaluation.evaluate_split import SplitEvaluation
from blipfit.model.backbone import Backbone
from blipfit.recipe import Recipe
from blipfit.run_folder import Inputs, Run
from blipfit.runtime import distributed
from blipfit.training.checkpoint import Progress


@dataclass(frozen=True, slots=True)
class Finished:
    """An experiment that has stopped, with the tensors of its best epoch."""

    run: Run
    recipe: Recipe
    inputs: Inputs
    """What it was trained and evaluated with, by content."""
    progress: Progress
    state: dict[str, Tensor]
    counts: dict[str, int]
    """Trained parameters by component."""
    ranks: dict[str, Any] | None = None
    """AdaLoRA's history of ranks, see `Allocator.history`."""
    save_id: str = ""
    """Id of its last checkpoint."""


def write(
    finished: Finished,
    backbone: Backbone,
    splits: Mapping[str, EncodedSplit],
    evaluations: Mapping[str, SplitEvaluation],
    head_hash: str,
    texts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Write `adapter/`, `predictions.jsonl`, AdaLoRA's `ranks.json` and, last, `result.json`; returns the result."""
    folder, recipe, progress, state = finished.run, finished.recipe, finished.progress, finished.state
    counts, ranks = finished.counts, finished.ranks
    base = peft_format.BaseModel.of(backbone, recipe.model.name)
    adapter_hash = peft_format.save(folder.adapter, recipe.adapter, state, base, recipe.training.seed)
    if ranks:
        run_folder.write_json(folder.ranks_file, ranks)
    lines = [{"split": split, **record} for split, evaluation in evaluations.items() for record in evaluation.records]
    run_folder.write_lines(folder.predictions_file, lines)
    total, trained = _count_parameters(backbone.hf, state), sum(counts.values())
    result = {
        "experiment": recipe.experiment,
        "dataset": recipe.data.name,
        "metrics": {split: evaluation.metrics for split, evaluation in evaluations.items()},
        "best_epoch": progress.best_epoch + 1,
        "epochs": len(progress.history),
        "trained_parameters": trained,
        "trained_by_component": dict(counts),
        "total_parameters": total,
        "trained_share": trained / total,
        "prompt": recipe.data.prompt,
        "prompt_example": splits["test"].prompted[0].prompt,
        "texts": texts or {},
        "counts": {split: len(encoded_split) for split, encoded_split in splits.items()},
        **({"ranks": dict(zip(ranks["layers"], ranks["ranks"][-1], strict=True))} if ranks else {}),
        "adapter_sha256": adapter_hash,
        "base_sha256": base.sha256,
        "base_folder": base.folder,
        **_input_fields(finished.inputs),
        "head_sha256": head_hash,
        "seconds": round(progress.seconds, 3),
        "device": distributed.device_name(backbone.device),
        "precision": str(backbone.autocast_dtype or "torch.float32").removeprefix("torch."),
        "versions": run_folder.versions(),
        "differs_from_published": differences(recipe),
        "history": progress.history,
        "recipe": recipe.model_dump(mode="json"),
    }
    run_folder.write_json(folder.result_file, result)
    shutil.rmtree(folder.checkpoint, ignore_errors=True)  # several times as large as the adapter, not needed any more
    return result


def _input_fields(inputs: Inputs) -> dict[str, Any]:
    """Digests of the questions and images of each split, and of the teacher if there is one."""
    fields = {"questions_sha256": dict(inputs.questions), "images_sha256": dict(inputs.images)}
    return fields | ({"teacher": dict(inputs.teacher)} if inputs.teacher else {})


def _count_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    return int(sum(p.numel() for p in model.parameters())) + added_parameters(model, state)


def added_parameters(model: nn.Module, state: Mapping[str, Tensor]) -> int:
    """How many of an experiment's trained values are added to the model's own parameters."""
    own = {name for name, _ in model.named_parameters()}
    return sum(tensor.numel() for name, tensor in state.items() if name not in own)


def differences(recipe: Recipe) -> dict[str, Any] | None:
    """Fields where a recipe differs from the grid's of the same name: field → [the grid's value, this value].

    Of fields that follow from the model, only the model is listed. None if the grid has no experiment of that name.
    """
    try:
        published = grid.recipe(recipe.data.name, recipe.experiment)
        here = grid.recipe(recipe.data.name, recipe.experiment, recipe.model.name)
    except UserError:
        return None
    expected = here.model_copy(update={"model": published.model})
    return {path: list(pair) for path, pair in expected.differences(recipe).items()}
