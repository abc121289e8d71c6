"""Stage 2 of pre-training: trains the Q-Former on the frozen tower without a language model, as in BLIP-2.

The Q-Former reads a question, and a linear head predicts the answer among all answers of the icon world. Two more heads
have a loss: each of the 16 query outputs predicts the icon in one of the 16 cells of the board, and half way through
the layers it predicts whether the question names that icon. So the first cross-attention collects the picture cell by
cell, the question's tokens attend to the icons that they name, and half of the layers remain for reasoning.
A step costs a third of a step with a language model, and both families start from the result.

Shapes: B pictures or questions, 16 queries and as many cells, D channels, T tokens of text.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerBase

from blipfit.data import icons
from blipfit.data.icons.scene import BOARD
from blipfit.data.prompts import PromptedQuestion
from blipfit.pretraining.pretrain_vision_tower import PATCH_CLASSES, PATCHES_PER_SIDE, build_targets, render_pixels
from blipfit.pretraining.tasks import (
    ANSWERS,
    CAPTION_PROMPT,
    Mixture,
    find_named_things,
    sample_scenes,
    sample_tasks,
)

MAX_NAMED = 2  # a question names two things at most


class QFormerWithHeads(nn.Module):
    """Layer norm, query tokens and Q-Former of `hf`, and three linear heads that are not part of the result.

    The names of the attributes are the names of the weights in the state file.
    """

    def __init__(self, hf: InstructBlipForConditionalGeneration) -> None:
        super().__init__()
        self.post_layernorm, self.qformer = hf.vision_model.post_layernorm, hf.qformer
        self.query_tokens = hf.query_tokens
        width = self.query_tokens.shape[-1]
        self.answer, self.cell = nn.Linear(width, len(ANSWERS)), nn.Linear(width, sum(PATCH_CLASSES))
        self.named = nn.Linear(width, MAX_NAMED)
        assert self.query_tokens.shape[1] == BOARD**2, "a query for every cell"

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the query outputs of the last layer and of the middle layer, both [B, 16, D].

        `features` [B, 65, D] come from the tower before its last layer norm; `ids` and `mask` [B, T] are the question.
        """
        queries = self.query_tokens.expand(len(features), -1, -1)
        output = self.qformer(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=self.post_layernorm(features),
            output_hidden_states=True,
        )
        Q, layers = queries.shape[1], output.hidden_states
        return output.last_hidden_state[:, :Q], layers[len(layers) // 2][:, :Q]


def remove_letter(target: str) -> str:
    """Return a target without its option letter, in lower case: '(b) red' → 'red', 'Yes' → 'yes'."""
    return target.split(") ", 1)[-1].lower()


def compute_query_losses(
    hf: InstructBlipForConditionalGeneration,
    qformer: QFormerWithHeads,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    step: int,
    pictures: int,
    mixture: Mixture,
) -> dict[str, Tensor]:
    """Compute the losses of one step of stage 2 on pictures that only this step uses."""
    rng = random.Random(f"{seed}/queries/{step}")
    scenes = sample_scenes(seed, step * pictures, pictures, mixture)
    with torch.no_grad():
        hidden = hf.vision_model.embeddings(render_pixels(scenes))
        features = hf.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
    scene_tasks = [(index, task) for index, scene in enumerate(scenes) for task in sample_tasks(scene, mixture, rng)]
    indices, tasks = torch.tensor([index for index, _ in scene_tasks]), [task for _, task in scene_tasks]
    text = tokenizer([task.prompt for task in tasks], padding=True, return_tensors="pt")
    outputs, middle_outputs = qformer(features[indices], text["input_ids"], text["attention_mask"])
    return compute_head_losses(qformer, outputs, middle_outputs, tasks, read_cells(scenes)[indices], mixture)


def compute_head_losses(
    qformer: QFormerWithHeads,
    outputs: Tensor,
    middle_outputs: Tensor,
    tasks: list[PromptedQuestion],
    cells: Tensor,
    mixture: Mixture,
    not_blank: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the losses of the three heads.

    `outputs` and `middle_outputs` [B, 16, D] are the query outputs of the last and of the middle layer, `cells`
    [B, 16, 3] the contents of the cells. The answer head is trained neither on captions nor on rows where `not_blank`
    [B] is False.
    """
    named = F.binary_cross_entropy_with_logits(qformer.named(middle_outputs), mark_named_cells(tasks, cells))
    losses = {"cells": compute_cells_loss(qformer, outputs, cells), "named": mixture.named_loss_weight * named}
    rows = [
        row
        for row, task in enumerate(tasks)
        if task.prompt != CAPTION_PROMPT and (not_blank is None or bool(not_blank[row]))
    ]
    if rows:
        targets = torch.tensor([ANSWERS.index(remove_letter(tasks[row].target)) for row in rows])
        losses["answer"] = F.cross_entropy(qformer.answer(outputs[rows].mean(1)), targets)
    return losses


def mark_named_cells(tasks: list[PromptedQuestion], cells: Tensor) -> Tensor:
    """Return 1 where a cell's icon is the first, or the second, thing that a question names, else 0: [B, 16, 2]."""
    marks = torch.zeros(*cells.shape[:2], MAX_NAMED)
    for row, task in enumerate(tasks):
        for place, (color, shape) in enumerate(find_named_things(task.prompt)[:MAX_NAMED]):
            matches = cells[row, :, 0] > 0
            if shape:
                matches = matches & (cells[row, :, 0] == icons.SHAPES.index(shape) + 1)
            if color:
                matches = matches & (cells[row, :, 1] == icons.COLORS.index(color) + 1)
            marks[row, :, place] = matches.float()
    return marks


def read_cells(scenes: list[icons.Scene]) -> Tensor:
    """Return the classes of shape (or question mark), color and size of every cell, 0 if empty: [B, 16, 3]."""
    step = PATCHES_PER_SIDE // BOARD
    patches = build_targets(scenes)["icon"].view(len(scenes), PATCHES_PER_SIDE, PATCHES_PER_SIDE, 3)
    return patches[:, ::step, ::step].flatten(1, 2)


def compute_cells_loss(qformer: QFormerWithHeads, outputs: Tensor, cells: Tensor) -> Tensor:
    """Sum the cross entropies of shape, color and size, each averaged over the cells."""
    parts = qformer.cell(outputs).split(PATCH_CLASSES, dim=-1)
    losses = [F.cross_entropy(part.flatten(0, 1), cells[..., index].flatten()) for index, part in enumerate(parts)]
    return torch.stack(losses).sum()
