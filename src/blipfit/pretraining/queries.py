"""Stage 2 of the miniatures: the Q-Former learns to look before there is a language model, as in BLIP-2.

It reads a question and must name the answer among all answers of the icon world. Beside that, each of the 16 query
outputs names the icon in one of the 16 cells of the board, and knows half way whether it is one that the question
names: so the first cross-attention gathers the picture cell by cell, the text finds what it speaks of, and half of the
layers are left to reason over that. This stage costs a third of a step with a language model and teaches both families
at once.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import InstructBlipForConditionalGeneration, PreTrainedTokenizerBase

from blipfit.data import icons
from blipfit.data.icons.scene import BOARD
from blipfit.data.prompts import Prompted
from blipfit.pretraining.tasks import ANSWERS, CAPTION, Mixture, drawn, named_things, tasks
from blipfit.pretraining.tower import PARTS, SIDE, pixels, truth

NAMED = 2  # a question names two things at most


class Queries(nn.Module):
    """Layer norm, query tokens and Q-Former of `hf`, and three linear heads that are thrown away afterwards."""

    def __init__(self, hf: InstructBlipForConditionalGeneration) -> None:
        super().__init__()
        self.post_layernorm, self.qformer = hf.vision_model.post_layernorm, hf.qformer
        self.query_tokens = hf.query_tokens
        width = self.query_tokens.shape[-1]
        self.answer, self.cell = nn.Linear(width, len(ANSWERS)), nn.Linear(width, sum(PARTS))
        self.named = nn.Linear(width, NAMED)
        assert self.query_tokens.shape[1] == BOARD**2, "a query for every cell"

    def forward(self, features: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, 65, D] and question [B, T] → query outputs [B, 16, D], and the same half way."""
        queries = self.query_tokens.expand(len(features), -1, -1)
        hidden = self.qformer(
            input_ids=ids,
            attention_mask=torch.cat([mask.new_ones(queries.shape[:2]), mask], dim=1),
            query_embeds=queries,
            encoder_hidden_states=self.post_layernorm(features),
            output_hidden_states=True,
        )
        Q, layers = queries.shape[1], hidden.hidden_states
        return hidden.last_hidden_state[:, :Q], layers[len(layers) // 2][:, :Q]


def content(target: str) -> str:
    """The answer without its letter, in small letters: '(b) red' → 'red', 'Yes' → 'yes'."""
    return target.split(") ", 1)[-1].lower()


def losses(
    hf: InstructBlipForConditionalGeneration,
    queries: Queries,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    step: int,
    pictures: int,
    mixture: Mixture,
) -> dict[str, Tensor]:
    """The loss of one step on fresh pictures."""
    rng = random.Random(f"{seed}/queries/{step}")
    scenes = drawn(seed, step * pictures, pictures, mixture)
    with torch.no_grad():
        hidden = hf.vision_model.embeddings(pixels(scenes))
        features = hf.vision_model.encoder(inputs_embeds=hidden).last_hidden_state
    asked = [(row, made) for row, scene in enumerate(scenes) for made in tasks(scene, mixture, rng)]
    text = tokenizer([made.prompt for _, made in asked], padding=True, return_tensors="pt")
    rows = torch.tensor([row for row, _ in asked])
    seen, halfway = queries(features[rows], text["input_ids"], text["attention_mask"])
    return head_losses(queries, seen, halfway, [made for _, made in asked], cells(scenes)[rows], mixture)


def head_losses(
    queries: Queries,
    seen: Tensor,
    halfway: Tensor,
    asked: list[Prompted],
    held: Tensor,
    mixture: Mixture,
    real: Tensor | None = None,
) -> dict[str, Tensor]:
    """What the heads say of the query outputs; captions and rows that are not `real` have no answer to name."""
    fits = F.binary_cross_entropy_with_logits(queries.named(halfway), named_cells(asked, held))
    named = {"cells": cells_loss(queries, seen, held), "named": mixture.named * fits}
    rows = [row for row, made in enumerate(asked) if made.prompt != CAPTION and (real is None or bool(real[row]))]
    if rows:
        wanted = torch.tensor([ANSWERS.index(content(asked[row].target)) for row in rows])
        named["answer"] = F.cross_entropy(queries.answer(seen[rows].mean(1)), wanted)
    return named


def named_cells(asked: list[Prompted], held: Tensor) -> Tensor:
    """Whether a cell's icon is the first or the second thing that a question names, [B, 16, 2] of 0 and 1."""
    found = torch.zeros(*held.shape[:2], NAMED)
    for row, made in enumerate(asked):
        for place, (color, shape) in enumerate(named_things(made.prompt)[:NAMED]):
            fits = held[row, :, 0] > 0
            if shape:
                fits = fits & (held[row, :, 0] == icons.SHAPES.index(shape) + 1)
            if color:
                fits = fits & (held[row, :, 1] == icons.COLORS.index(color) + 1)
            found[row, :, place] = fits.float()
    return found


def cells(scenes: list[icons.Scene]) -> Tensor:
    """Shape (or the question mark), color and size in every cell, [B, 16, 3]; 0 where nothing stands."""
    step = SIDE // BOARD
    patches = truth(scenes)["icon"].view(len(scenes), SIDE, SIDE, 3)
    return patches[:, ::step, ::step].flatten(1, 2)


def cells_loss(queries: Queries, seen: Tensor, wanted: Tensor) -> Tensor:
    """Summed cross entropy of shape, color and size, averaged over cells."""
    parts = queries.cell(seen).split(PARTS, dim=-1)
    losses = [F.cross_entropy(part.flatten(0, 1), wanted[..., i].flatten()) for i, part in enumerate(parts)]
    return torch.stack(losses).sum()
