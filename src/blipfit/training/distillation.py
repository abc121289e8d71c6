"""Distillation: a smaller model also learns to see and to answer as the original does.

`K` experiments of the bank, `B` questions, `Q` query tokens, `N` label positions, `D` width, `V` vocabulary.
"""

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfit.adapters import peft_format
from blipfit.data.batches import TargetBatch
from blipfit.errors import UserError
from blipfit.grid import SHRINK_RECORD, shrink_record
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import DistillationConfig, ModelConfig, Recipe
from blipfit.run import Run


class Teacher:
    """An original in eval mode; `queries`: which of its query tokens the student has, in the student's order."""

    def __init__(self, backbone: Backbone, part: DistillationConfig, queries: Tensor):
        self.backbone, self.part, self.queries = backbone, part, queries

    def losses(
        self,
        student: Backbone,
        visual: Tensor,
        features: Tensor,
        batch: TargetBatch,
        labels_per_question: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What is learned from, and the ordinary losses to be told, both summed over the N labels, one an experiment.

        `visual`: the student's visual tokens `K·B × Q × D`. The distance of visual tokens is their mean squared
        difference in parts of the teacher's variance, and a question's counts as much as `labels_per_question` labels,
        the mean of the effective batch; that of answers is KL(teacher ‖ student) at every label position. Where neither
        labels nor answers count, the language models do not run, and both are the distance of visual tokens.
        """
        K, N = student.experiments, len(batch.labels_N)
        with torch.no_grad():
            wanted = self.backbone.query(features, batch)
        if self.part.visual:
            mine, its = visual.unflatten(0, (K, -1)).float(), wanted[:, self.queries].float()
            apart_K = labels_per_question * (mine - its).square().mean((2, 3)).sum(1) / its.var()
            if not (self.part.labels or self.part.answers):
                return self.part.visual * apart_K, apart_K
        logits_KNV = student.target_logits(visual, batch).float()
        labels = batch.labels_N.expand(K, N)
        ordinary_K = F.cross_entropy(logits_KNV.transpose(1, 2), labels, reduction="none").sum(1)
        learned_K = self.part.labels * ordinary_K
        if self.part.visual:
            learned_K = learned_K + self.part.visual * apart_K
        if self.part.answers:
            with torch.no_grad():
                taught_NV = self.backbone.target_logits(wanted, batch)[0].float()
            said = F.log_softmax(logits_KNV, dim=-1)
            taught = F.log_softmax(taught_NV, dim=-1).expand_as(said)
            diverged_KN = F.kl_div(said, taught, reduction="none", log_target=True).sum(2)
            diverged_K = (diverged_KN * (batch.labels_N >= 0)).sum(1)  # −100 only fills up
            learned_K = learned_K + self.part.answers * diverged_K
        return learned_K, ordinary_K


def teacher(recipe: Recipe, student: Backbone) -> Teacher | None:
    """The recipe's teacher, loaded like its student, or None. UserError where it is no original of the student.

    Weights that both have are in memory once. To be called before a bank is installed in the student.
    """
    part = recipe.distillation
    if part.teacher is None:
        return None
    run, training = Run(Path(part.teacher)), recipe.training
    model = run.recipe().model if run.recipe_file.exists() else ModelConfig(name=part.teacher)
    backbone = loading.load(
        model, training.precision, student.device, training.max_text_tokens, training.max_target_tokens
    )
    _check(part.teacher, backbone.hf, student)
    if run.recipe_file.exists():
        if run.state() != "finished":
            raise UserError(f"{part.teacher} is not finished; only a finished run can teach")
        peft_format.install(backbone, run.adapter)
    backbone.hf.requires_grad_(False).eval()
    return Teacher(backbone, part, _queries(recipe, backbone, student))


def locate(name: str) -> None:
    """UserError where a teacher is neither a run folder nor a model that can be had."""
    if Run(Path(name)).recipe_file.exists():
        return
    try:
        loading.locate(ModelConfig(name=name))
    except UserError as error:
        raise UserError(f"the teacher cannot be had: {error}; say where it is: --set distillation.teacher=…") from error


def _check(name: str, hf: Any, student: Backbone) -> None:
    """Same vision tower (its features are what both read) and same vocabularies; equal weights become shared."""
    here = student.hf
    for tower in ("vision_model", "language_model"):
        mine, its = (dict(getattr(model, tower).named_parameters()) for model in (here, hf))
        equal = {n for n in its if n in mine and its[n].shape == mine[n].shape and bool((its[n] == mine[n]).all())}
        if tower == "vision_model" and (odd := [n for n in its if n not in equal and not n.startswith("post_layer")]):
            raise UserError(
                f"{name} cannot teach {student.name}: it sees otherwise ({odd[0]}); give the model it was shrunk from"
            )
        for weight in equal - {"post_layernorm.weight", "post_layernorm.bias"}:
            its[weight].data = mine[weight].data
    for part in ("qformer_config", "text_config"):
        if getattr(hf.config, part).vocab_size != getattr(here.config, part).vocab_size:
            raise UserError(f"{name} cannot teach {student.name}: their vocabularies differ")


def _queries(recipe: Recipe, backbone: Backbone, student: Backbone) -> Tensor:
    """Which of the teacher's query tokens the student's are: all, or those that `shrink.json` names."""
    count, mine = backbone.hf.query_tokens.shape[1], student.hf.query_tokens.shape[1]
    if count == mine or not recipe.distillation.visual:
        return torch.arange(count, device=student.device)
    kept = shrink_record(recipe.model.name).get("kept", {}).get("queries", [])
    if len(kept) != mine or max(kept) >= count:
        raise UserError(
            f"{backbone.name} has {count} query tokens and {student.name} {mine}, and no {SHRINK_RECORD} says which "
            "they are; set distillation.visual=0, or teach a folder that `blipfit shrink` made"
        )
    return torch.tensor(kept, device=student.device)
