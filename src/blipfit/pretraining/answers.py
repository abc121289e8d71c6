"""Stages 3 and 4 of the miniatures: the language model on text, then all but the frozen tower together.

Every step draws fresh pictures and asks a few things of each: questions with options in the prompt of fine-tuning,
the same without options, MME's yes/no questions, captions. The loss is the language model's own; the heads of the
Q-Former's stage stay on beside it, at a smaller weight, because they teach the Q-Former more directly.
"""

import random
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.t5.modeling_t5 import T5Attention

from blipfit.data.icons.scene import BOARD
from blipfit.data.prompts import Prompted
from blipfit.model.backbone import Backbone
from blipfit.pretraining.queries import Queries, cells, head_losses
from blipfit.pretraining.tasks import CAPTION, Mixture, drawn, emptied, lookups, misread, tasks
from blipfit.pretraining.tower import pixels

NEIGHBOUR = 4.0  # in the logits of attention


class Trained(nn.Module):
    """What stage 3 trains: everything but the tower; the layer norm after the tower belongs to it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hf = backbone.hf
        hf.vision_model.requires_grad_(False)
        hf.vision_model.post_layernorm.requires_grad_(True)
        self.queries = Queries(hf)
        self.projection, self.language_model = hf.language_projection, hf.language_model


@torch.no_grad()
def head_start(language_model: nn.Module) -> None:
    """Attention that begins where large models arrive: like looks for like, one head looks one back, one ahead.

    Naming the letter before a known answer takes both, and so small a model finds them late: 400 steps on
    text alone then bring T5 to 96 % of letters instead of to chance.
    """
    for module in language_model.modules():
        if hasattr(module, "q_proj"):
            module.q_proj.weight.copy_(module.k_proj.weight)
        elif isinstance(module, T5Attention):
            module.q.weight.copy_(module.k.weight * module.key_value_proj_dim**-0.5)  # T5 does not scale
    if hasattr(language_model, "encoder"):
        bias = (
            language_model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        )  # [distances, heads]
        bias[1, 0] += NEIGHBOUR
        bias[len(bias) // 2 + 1, 1] += NEIGHBOUR


def losses(
    backbone: Backbone, trained: Trained, seed: int, step: int, pictures: int, mixture: Mixture
) -> dict[str, Tensor]:
    """The losses of one step of stage 4; the language model's tokens weigh 1/√(tokens of their answer)."""
    rng = random.Random(f"{seed}/answers/{step}")
    found = _seen_losses(backbone, trained, seed, step, pictures, mixture, rng)
    return {**found, "lookups": lookup_loss(backbone, mixture.lookups, rng)} if mixture.lookups else found


def _seen_losses(
    backbone: Backbone,
    trained: Trained,
    seed: int,
    step: int,
    pictures: int,
    mixture: Mixture,
    rng: random.Random,
) -> dict[str, Tensor]:
    scenes = drawn(seed, step * pictures, pictures, mixture)
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
            total, number, head = _weighted(backbone, trained, seen, chosen, mixture, rng)
            language[name], weight, heads = total, weight + number, heads + head * len(chosen) / len(asked)
    return {**{name: total / weight for name, total in language.items()}, "heads": heads}


def lookup_loss(backbone: Backbone, number: int, rng: random.Random) -> Tensor:
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
    backbone: Backbone,
    trained: Trained,
    seen: Seen,
    chosen: list[tuple[int, Prompted]],
    mixture: Mixture,
    rng: random.Random,
) -> tuple[Tensor, float, Tensor]:
    """Weighted sum of the tokens' losses, the sum of the weights, and the weighted loss of the Q-Former's heads."""
    made = [one for _, one in chosen]
    rows = torch.tensor([row for row, _ in chosen])
    encoded = backbone.text.encode(made)
    if mixture.misread:
        other = backbone.text.encode([misread(one, rng) if rng.random() < mixture.misread else one for one in made])
        encoded = [replace(two, qformer=one.qformer) for one, two in zip(encoded, other, strict=True)]
    batch = backbone.text.targets(encoded)
    queried, halfway = trained.queries(seen.features[rows], batch.qformer_ids_BT, batch.qformer_mask_BT)
    logits = backbone.target_logits(trained.projection(queried), batch)[0]
    lengths = torch.tensor([len(row.target) for row in encoded])
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    token = F.cross_entropy(logits.float(), batch.labels_N, reduction="none")
    held, real = seen.cells[rows], rows < len(seen.features) - 1
    heads = sum(head_losses(trained.queries, queried, halfway, made, held, mixture, real).values(), torch.zeros(()))
    return (token * weights).sum(), float(weights.sum()), mixture.heads * heads
