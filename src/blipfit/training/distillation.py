"""Distillation: a smaller model also learns the visual tokens and the answers of the original.

`K` experiments of the bank, `B` questions, `Q` query tokens, `N` label positions, `D` width, `V` vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from blipfit.adapters import open_model
from blipfit.data.batches import TargetBatch
from blipfit.errors import UserError
from blipfit.grid import SHRINK_RECORD, shrink_record
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.recipe import DistillationConfig, Recipe
from blipfit.runtime import distributed


class Teacher:
    """An original in eval mode; `queries`: indices of its query tokens that the student has, in the student's order."""

    def __init__(self, backbone: Backbone, config: DistillationConfig, queries: Tensor):
        self.backbone, self.config, self.queries = backbone, config, queries

    def losses(
        self,
        student: Backbone,
        visual: Tensor,
        features: Tensor,
        batch: TargetBatch,
        labels_per_question: float | Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The training objectives and the ordinary losses for reports, both summed over the N labels (K each).

        `visual`: the student's visual tokens `K·B × Q × D`. The distance of visual tokens is their mean squared
        difference divided by the teacher's variance; each question's distance is multiplied by `labels_per_question`,
        the mean number of labels per question in the effective batch. The distance of answers is KL(teacher ‖ student)
        at every label position. If neither labels nor answers have a weight, the language models do not run, and both
        results are the distance of visual tokens.
        """
        K, N = student.experiments, len(batch.labels_N)
        with torch.no_grad():
            teacher_visual = self.backbone.query(features, batch)
        if self.config.visual:
            student_KBQD, teacher_BQD = visual.unflatten(0, (K, -1)).float(), teacher_visual[:, self.queries].float()
            squares_KB = (student_KBQD - teacher_BQD).square().mean((2, 3))
            distance_K = labels_per_question * squares_KB.sum(1) / distributed.variance(teacher_BQD)
            if not (self.config.labels or self.config.answers):
                return self.config.visual * distance_K, distance_K
        logits_KNV = student.target_logits(visual, batch).float()
        labels = batch.labels_N.expand(K, N)
        losses_K = F.cross_entropy(logits_KNV.transpose(1, 2), labels, reduction="none").sum(1)
        objectives_K = self.config.labels * losses_K
        if self.config.visual:
            objectives_K = objectives_K + self.config.visual * distance_K
        if self.config.answers:
            with torch.no_grad():
                teacher_NV = self.backbone.target_logits(teacher_visual, batch)[0].float()
            student_log_KNV = F.log_softmax(logits_KNV, dim=-1)
            teacher_log_KNV = F.log_softmax(teacher_NV, dim=-1).expand_as(student_log_KNV)
            divergence_KN = F.kl_div(student_log_KNV, teacher_log_KNV, reduction="none", log_target=True).sum(2)
            divergence_K = (divergence_KN * (batch.labels_N >= 0)).sum(1)  # label −100 is padding
            objectives_K = objectives_K + self.config.answers * divergence_K
        return objectives_K, losses_K


def load_teacher(recipe: Recipe, student: Backbone) -> Teacher | None:
    """The recipe's teacher in the student's precision, or None if the recipe has none.

    Weights that both models have are in memory once. Must be called before a bank is installed in the student. Raises
    UserError if the teacher cannot be loaded, or is not an original of the student.
    """
    config = recipe.distillation
    if config.teacher is None:
        return None
    model = open_model.open_model(config.teacher, student.device, recipe.training.precision)
    _share_equal_weights(config.teacher, model.backbone.hf, student)
    model.install_adapter()
    model.backbone.hf.requires_grad_(False).eval()
    return Teacher(model.backbone, config, _query_indices(recipe, model.backbone, student))


def identify_teacher(name: str) -> dict[str, str | None]:
    """Return the digests of a teacher's base weights (None if they are not downloaded yet) and adapter (None for a
    model without).

    Raises UserError if the teacher is neither a finished run nor a model that can be loaded.
    """
    try:
        source = open_model.locate_model(name)
        return {"base_sha256": loading.base_sha256(source.model), "adapter_sha256": source.adapter_sha256}
    except UserError as error:
        raise UserError(
            f"the teacher cannot be used: {error}; name another with --set distillation.teacher=…"
        ) from error


def _share_equal_weights(name: str, hf: Any, student: Backbone) -> None:
    """Point equal weights of both models to the same memory.

    Raises UserError unless both have the same vision tower (the teacher reads the student's image features) and the
    same vocabularies.
    """
    for tower in ("vision_model", "language_model"):
        student_weights, weights = (dict(getattr(model, tower).named_parameters()) for model in (student.hf, hf))
        equal = {
            weight_name
            for weight_name, weight in weights.items()
            if weight_name in student_weights
            and weight.shape == student_weights[weight_name].shape
            and bool((weight == student_weights[weight_name]).all())
        }
        different = [n for n in weights if n not in equal and not n.startswith("post_layer")]
        if tower == "vision_model" and different:
            raise UserError(
                f"{name} cannot teach {student.name}: its vision tower differs ({different[0]}); "
                "give the model that the student was shrunk from"
            )
        for weight_name in equal - {"post_layernorm.weight", "post_layernorm.bias"}:
            weights[weight_name].data = student_weights[weight_name].data
    for section in ("qformer_config", "text_config"):
        if getattr(hf.config, section).vocab_size != getattr(student.hf.config, section).vocab_size:
            raise UserError(f"{name} cannot teach {student.name}: their vocabularies differ")


def _query_indices(recipe: Recipe, backbone: Backbone, student: Backbone) -> Tensor:
    """Indices of the teacher's query tokens that the student has: all, or those that `shrink.json` names."""
    count, student_count = backbone.hf.query_tokens.shape[1], student.hf.query_tokens.shape[1]
    if count == student_count or not recipe.distillation.visual:
        return torch.arange(count, device=student.device)
    indices = shrink_record(recipe.model.name).get("kept", {}).get("queries", [])
    if len(indices) != student_count or max(indices) >= count:
        raise UserError(
            f"{backbone.name} has {count} query tokens and {student.name} {student_count}, and no {SHRINK_RECORD} says "
            "which they are; set distillation.visual=0, or teach a folder that `blipfit shrink` made"
        )
    return torch.tensor(indices, device=student.device)
