"""Stages 3 and 4 of pre-training: trains the language model on text, then everything except the frozen vision tower.

Every step uses new pictures and samples a few tasks about each: questions with options in the prompt of fine-tuning,
questions without options, MME's yes/no questions, and captions. The loss is the language model's own. The losses of the
Q-Former's heads (stage 2) are added at a smaller weight, because they train the Q-Former more directly.

Shapes: B pictures and a blank one, D channels, 65 features per picture, 16 cells, N tokens of targets.
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from blipfit.data.icons.scene import BOARD
from blipfit.data.prompts import PromptedQuestion
from blipfit.model.backbone import Backbone
from blipfit.pretraining.pretrain_qformer import QFormerWithHeads, compute_head_losses, read_cells
from blipfit.pretraining.pretrain_vision_tower import render_pixels
from blipfit.pretraining.tasks import (
    CAPTION_PROMPT,
    Mixture,
    randomize_target,
    replace_question,
    sample_lookups,
    sample_scenes,
    sample_tasks,
)

NEIGHBOR_BIAS = 4.0  # in the logits of attention


class AnswerModules(nn.Module):
    """The modules that stage 4 trains: all but the tower, whose last layer norm is trained with the Q-Former.

    The names of the attributes are the names of the weights in the state file.
    """

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hf = backbone.hf
        hf.vision_model.requires_grad_(False)
        hf.vision_model.post_layernorm.requires_grad_(True)
        self.queries = QFormerWithHeads(hf)
        self.projection, self.language_model = hf.language_projection, hf.language_model


@torch.no_grad()
def initialize_attention(language_model: nn.Module) -> None:
    """Start attention in a state that large models learn by themselves and so small a model finds late.

    Queries equal keys, so a token attends to equal tokens; in T5, one head attends to the previous token and one to
    the next. Both are needed to name the letter before a known answer: after 400 steps on text alone T5 gives 96 % of
    the letters, instead of as many as by chance.
    """
    for module in language_model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.copy_(module.k_proj.weight)
        elif isinstance(module, T5Attention):
            module.q.weight.copy_(module.k.weight * module.key_value_proj_dim**-0.5)  # T5 does not scale
    if hasattr(language_model, "encoder"):
        self_attention = language_model.encoder.block[0].layer[0].SelfAttention
        bias = self_attention.relative_attention_bias.weight  # [distances, heads]
        bias[1, 0] += NEIGHBOR_BIAS
        bias[len(bias) // 2 + 1, 1] += NEIGHBOR_BIAS


def compute_answer_losses(
    backbone: Backbone, modules: AnswerModules, seed: int, step: int, pictures: int, mixture: Mixture
) -> dict[str, Tensor]:
    """Compute the losses of one step of stage 4 on pictures that only this step uses.

    Each token of a target has the weight 1/√(number of tokens of the target).
    """
    rng = random.Random(f"{seed}/answers/{step}")
    losses = _compute_picture_losses(backbone, modules, seed, step, pictures, mixture, rng)
    if mixture.lookups_per_step:
        losses["lookups"] = compute_lookup_loss(backbone, mixture.lookups_per_step, rng)
    return losses


def compute_lookup_loss(backbone: Backbone, count: int, rng: random.Random) -> Tensor:
    """Compute the language model's loss on `count` text-only questions, averaged over the tokens of their targets."""
    batch = backbone.text.targets(backbone.text.encode(sample_lookups(count, rng)))
    no_visual_tokens = torch.zeros(count, 0, backbone.language.config.hidden_size)
    return F.cross_entropy(backbone.target_logits(no_visual_tokens, batch)[0].float(), batch.labels_N)


@dataclass(frozen=True)
class PictureBatch:
    """The pictures of a step, and a blank picture last."""

    features: Tensor
    """Image features [B + 1, 65, D]."""
    cells: Tensor
    """Contents of the cells [B + 1, 16, 3], see `read_cells`."""


def _compute_picture_losses(
    backbone: Backbone,
    modules: AnswerModules,
    seed: int,
    step: int,
    pictures: int,
    mixture: Mixture,
    rng: random.Random,
) -> dict[str, Tensor]:
    scenes = sample_scenes(seed, step * pictures, pictures, mixture)
    pixels = render_pixels(scenes)
    batch = PictureBatch(
        backbone.see(torch.cat([pixels, torch.zeros_like(pixels[:1])])),
        torch.cat([read_cells(scenes), torch.zeros(1, BOARD**2, 3, dtype=torch.long)]),
    )
    numbered = [(index, task) for index, scene in enumerate(scenes) for task in sample_tasks(scene, mixture, rng)]
    if mixture.blank_share:
        numbered = [
            (pictures, randomize_target(task, rng))
            if task.candidates and rng.random() < mixture.blank_share
            else (index, task)
            for index, task in numbered
        ]
    sums, weight, heads = {}, 0.0, torch.zeros(())
    for name, is_caption in (("answers", False), ("captions", True)):
        rows = [(index, task) for index, task in numbered if (task.prompt == CAPTION_PROMPT) is is_caption]
        if rows:
            loss_sum, weight_sum, heads_loss = _weighted_losses(backbone, modules, batch, rows, mixture, rng)
            sums[name], weight = loss_sum, weight + weight_sum
            heads = heads + heads_loss * len(rows) / len(numbered)
    return {**{name: loss_sum / weight for name, loss_sum in sums.items()}, "heads": heads}


def _weighted_losses(
    backbone: Backbone,
    modules: AnswerModules,
    pictures: PictureBatch,
    numbered: list[tuple[int, PromptedQuestion]],
    mixture: Mixture,
    rng: random.Random,
) -> tuple[Tensor, float, Tensor]:
    """Compute the losses of tasks that are given with the index of their picture.

    Returns the weighted sum of the tokens' losses, the sum of the weights, and the weighted loss of the heads.
    """
    indices, tasks = torch.tensor([index for index, _ in numbered]), [task for _, task in numbered]
    encoded = backbone.text.encode(tasks)
    if mixture.random_text_share:
        changed = backbone.text.encode(
            [replace_question(task, rng) if rng.random() < mixture.random_text_share else task for task in tasks]
        )
        encoded = [replace(new, qformer=old.qformer) for old, new in zip(encoded, changed, strict=True)]
    batch = backbone.text.targets(encoded)
    outputs, middle = modules.queries(pictures.features[indices], batch.qformer_ids_BT, batch.qformer_mask_BT)
    logits = backbone.target_logits(modules.projection(outputs), batch)[0]
    lengths = torch.tensor([len(row.target) for row in encoded])
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    losses = F.cross_entropy(logits.float(), batch.labels_N, reduction="none")
    cells, not_blank = pictures.cells[indices], indices < len(pictures.features) - 1
    heads = compute_head_losses(modules.queries, outputs, middle, tasks, cells, mixture, not_blank)
    heads_loss = sum(heads.values(), torch.zeros(()))
    return (losses * weights).sum(), float(weights.sum()), mixture.heads_loss_weight * heads_loss
