"""Stage 3 of the miniatures: Q-Former, projection and language model on top of the frozen tower.

Every step draws fresh pictures and asks a few things of each: questions with options in the prompt of fine-tuning,
the same without options, MME's yes/no questions, captions. The loss is the language model's own; the heads of the
Q-Former's stage stay on beside it, at a smaller weight, because they teach the Q-Former more directly.
"""

import random

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.data import icons
from blipfit.data.prompts import Prompted
from blipfit.model.backbone import Backbone
from blipfit.training.pretrain_queries import Queries, cells, head_losses
from blipfit.training.pretrain_tasks import CAPTION, Mixture, tasks
from blipfit.training.pretrain_tower import pixels


class Trained(nn.Module):
    """What stage 3 trains: everything but the tower; the layer norm after the tower belongs to it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hf = backbone.hf
        hf.vision_model.requires_grad_(False)
        hf.vision_model.post_layernorm.requires_grad_(True)
        self.queries = Queries(hf)
        self.projection, self.language_model = hf.language_projection, hf.language_model


def losses(
    backbone: Backbone, trained: Trained, seed: int, step: int, pictures: int, mixture: Mixture
) -> dict[str, Tensor]:
    """The losses of one step; the language model's tokens weigh 1/√(tokens of their answer)."""
    rng = random.Random(f"{seed}/answers/{step}")
    scenes = [icons.scene(seed, step * pictures + row) for row in range(pictures)]
    features, held = backbone.see(pixels(scenes)), cells(scenes)
    asked = [(row, made) for row, scene in enumerate(scenes) for made in tasks(scene, mixture, rng)]
    language, weight, heads = {}, 0.0, torch.zeros(())
    for name, wanted in (("answers", False), ("captions", True)):
        chosen = [(row, made) for row, made in asked if (made.prompt == CAPTION) is wanted]
        if chosen:
            rows = torch.tensor([row for row, _ in chosen])
            total, number, head = _weighted(backbone, trained, features[rows], held[rows], [made for _, made in chosen])
            language[name], weight, heads = total, weight + number, heads + head * len(chosen) / len(asked)
    return {**{name: total / weight for name, total in language.items()}, "heads": mixture.heads * heads}


def _weighted(
    backbone: Backbone, trained: Trained, features: Tensor, held: Tensor, chosen: list[Prompted]
) -> tuple[Tensor, float, Tensor]:
    """Weighted sum of the tokens' losses, the sum of the weights, and the loss of the Q-Former's heads."""
    encoded = backbone.text.encode(chosen)
    batch = backbone.text.targets(encoded)
    seen = trained.queries(features, batch.qformer_ids_BT, batch.qformer_mask_BT)
    logits = backbone.target_logits(trained.projection(seen), batch)[0]
    lengths = torch.tensor([len(row.target) for row in encoded])
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    token = F.cross_entropy(logits.float(), batch.labels_N, reduction="none")
    heads = sum(head_losses(trained.queries, seen, chosen, held).values(), torch.zeros(()))
    return (token * weights).sum(), float(weights.sum()), heads
