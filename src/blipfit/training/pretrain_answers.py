"""Stage 3 of the miniatures: Q-Former, projection and language model on top of the frozen tower.

Every step draws fresh pictures and asks a few things of each: questions with options in the prompt of fine-tuning,
the same without options, MME's yes/no questions, captions. The loss is the language model's own; the heads of the
Q-Former's stage stay on beside it, at a smaller weight, because they teach the Q-Former more directly.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.data import icons
from blipfit.data.icons.scene import BOARD
from blipfit.data.prompts import Prompted
from blipfit.model.backbone import Backbone
from blipfit.training.pretrain_queries import Queries, cells, head_losses
from blipfit.training.pretrain_tasks import CAPTION, Mixture, emptied, lookups, named_things, tasks
from blipfit.training.pretrain_tower import pixels

NAMED = 2  # a question names two things at most


class Trained(nn.Module):
    """What stage 3 trains: everything but the tower; the layer norm after the tower belongs to it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hf = backbone.hf
        hf.vision_model.requires_grad_(False)
        hf.vision_model.post_layernorm.requires_grad_(True)
        self.queries = Queries(hf)
        self.projection, self.language_model = hf.language_projection, hf.language_model
        self.named = nn.Linear(hf.query_tokens.shape[-1], NAMED)


def losses(
    backbone: Backbone, trained: Trained, seed: int, step: int, pictures: int, mixture: Mixture
) -> dict[str, Tensor]:
    """The losses of one step; the language model's tokens weigh 1/√(tokens of their answer)."""
    rng = random.Random(f"{seed}/answers/{step}")
    found = _seen_losses(backbone, trained, seed, step, pictures, mixture, rng) if pictures else {}
    return {**found, "lookups": _lookup_loss(backbone, mixture.lookups, rng)} if mixture.lookups else found


def _seen_losses(
    backbone: Backbone,
    trained: Trained,
    seed: int,
    step: int,
    pictures: int,
    mixture: Mixture,
    rng: random.Random,
) -> dict[str, Tensor]:
    scenes = [icons.scene(seed, step * pictures + row) for row in range(pictures)]
    images = pixels(scenes)
    seen = Seen(
        backbone.see(torch.cat([images, torch.zeros_like(images[:1])])),
        torch.cat([cells(scenes), torch.zeros(1, BOARD**2, 3, dtype=torch.long)]),
    )
    asked = [(row, made) for row, scene in enumerate(scenes) for made in tasks(scene, mixture, rng)]
    if mixture.blank:
        asked = [
            (pictures, emptied(made, rng)) if made.candidates and rng.random() < mixture.blank else (row, made)
            for row, made in asked
        ]
    language, weight, heads = {}, 0.0, torch.zeros(())
    for name, wanted in (("answers", False), ("captions", True)):
        chosen = [(row, made) for row, made in asked if (made.prompt == CAPTION) is wanted]
        if chosen:
            total, number, head = _weighted(backbone, trained, seen, chosen, mixture)
            language[name], weight, heads = total, weight + number, heads + head * len(chosen) / len(asked)
    return {**{name: total / weight for name, total in language.items()}, "heads": heads}


def _lookup_loss(backbone: Backbone, number: int, rng: random.Random) -> Tensor:
    """The language model's loss without any visual token, averaged over answer tokens."""
    batch = backbone.text.targets(backbone.text.encode(lookups(number, rng)))
    nothing = torch.zeros(number, 0, backbone.language.config.hidden_size)
    return F.cross_entropy(backbone.target_logits(nothing, batch)[0].float(), batch.labels_N)


@dataclass(frozen=True)
class Seen:
    """A step's pictures, an empty one last: features [B + 1, 65, D] and what the cells hold [B + 1, 16, 3]."""

    features: Tensor
    cells: Tensor


def _weighted(
    backbone: Backbone, trained: Trained, seen: Seen, chosen: list[tuple[int, Prompted]], mixture: Mixture
) -> tuple[Tensor, float, Tensor]:
    """Weighted sum of the tokens' losses, the sum of the weights, and the weighted loss of the Q-Former's heads."""
    made = [one for _, one in chosen]
    rows = torch.tensor([row for row, _ in chosen])
    encoded = backbone.text.encode(made)
    batch = backbone.text.targets(encoded)
    queried = trained.queries(seen.features[rows], batch.qformer_ids_BT, batch.qformer_mask_BT)
    logits = backbone.target_logits(trained.projection(queried), batch)[0]
    lengths = torch.tensor([len(row.target) for row in encoded])
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    token = F.cross_entropy(logits.float(), batch.labels_N, reduction="none")
    held, real = seen.cells[rows], rows < len(seen.features) - 1
    named = F.binary_cross_entropy_with_logits(trained.named(queried), named_cells(made, held))
    heads = sum(head_losses(trained.queries, queried, made, held, real).values(), torch.zeros(()))
    return (token * weights).sum(), float(weights.sum()), mixture.heads * heads + mixture.named * named


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
