"""Stage 2 of the miniatures: Q-Former, projection and language model on top of the frozen tower.

Every step draws fresh pictures and asks a few things of each: questions with options in the prompt of fine-tuning,
the same without options, MME's yes/no questions, captions. The loss is the language model's own.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from blipfit.data import icons
from blipfit.data.prompts import PROMPTS, Prompted
from blipfit.model.backbone import Backbone
from blipfit.training import pretrain_texts
from blipfit.training.pretrain_texts import as_question
from blipfit.training.pretrain_tower import pixels


@dataclass(frozen=True)
class Mixture:
    """How often what is asked: weights of the draw among all that a picture allows, without replacement."""

    asks: int = 3
    """Tasks a picture."""
    options: float = 0.7
    """Share of the questions that come with options; the rest is answered freely."""
    yes_no: float = 0.6
    caption: float = 0.8
    hard: float = 2.5
    """Weight of the skills below; the others weigh 1."""
    hard_skills: tuple[str, ...] = ("count_all", "count_kind", "relation", "where", "beside", "time", "scale")


class Trained(nn.Module):
    """What stage 2 trains: everything but the tower; the layer norm after the tower belongs to it."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        hf = backbone.hf
        hf.vision_model.requires_grad_(False)
        hf.vision_model.post_layernorm.requires_grad_(True)
        self.post_layernorm, self.qformer = hf.vision_model.post_layernorm, hf.qformer
        self.query_tokens = hf.query_tokens
        self.projection, self.language_model = hf.language_projection, hf.language_model


def tasks(scene: icons.Scene, mixture: Mixture, rng: random.Random) -> list[Prompted]:
    """At most `mixture.asks` things to be said about a picture."""
    pool: list[tuple[float, Prompted]] = []
    for ask in icons.questions(scene, icons.PRETRAINED):
        question = as_question(ask.question, ask.answer, ask.choices, ask.answer_index)
        freely = PROMPTS["vqa-v1"](as_question(ask.question, ask.answer))
        made = PROMPTS["iconqa-v1"](question) if rng.random() < mixture.options else freely
        pool.append((mixture.hard if ask.skill in mixture.hard_skills else 1.0, made))
    for pair in icons.yes_no(scene):
        yes = rng.random() < 0.5
        pool.append((mixture.yes_no, Prompted(pair.yes if yes else pair.no, "Yes" if yes else "No", ())))
    told = pretrain_texts.caption(scene, rng)
    pool.append((mixture.caption, PROMPTS["caption-v1"](as_question("", told))))
    return _drawn(pool, mixture.asks, rng)


def _drawn(pool: list[tuple[float, Prompted]], number: int, rng: random.Random) -> list[Prompted]:
    """A weighted draw without replacement: the largest u^(1/weight)."""
    keyed = sorted(pool, key=lambda item: -(rng.random() ** (1 / item[0])))
    return [made for _, made in keyed[:number]]


def losses(backbone: Backbone, seed: int, step: int, pictures: int, mixture: Mixture) -> dict[str, Tensor]:
    """The loss of one step: short answers and captions, each token weighing 1/√(tokens of its answer)."""
    rng = random.Random(f"{seed}/answers/{step}")
    scenes = [icons.scene(seed, step * pictures + row) for row in range(pictures)]
    features = backbone.see(pixels(scenes))
    asked = [(row, made) for row, scene in enumerate(scenes) for made in tasks(scene, mixture, rng)]
    caption = PROMPTS["caption-v1"](as_question("", "")).prompt
    found, weight = {}, 0.0
    for name, wanted in (("answers", False), ("captions", True)):
        chosen = [(row, made) for row, made in asked if (made.prompt == caption) is wanted]
        if chosen:
            total, number = _weighted(backbone, features, chosen)
            found[name], weight = total, weight + number
    return {name: total / weight for name, total in found.items()}


def _weighted(backbone: Backbone, features: Tensor, chosen: list[tuple[int, Prompted]]) -> tuple[Tensor, float]:
    """Weighted sum of the tokens' losses, and the sum of the weights."""
    encoded = backbone.text.encode([made for _, made in chosen])
    batch = backbone.text.targets(encoded)
    visual = backbone.query(features[[row for row, _ in chosen]], batch)
    logits = backbone.target_logits(visual, batch)[0]
    lengths = torch.tensor([len(row.target) for row in encoded])
    weights = lengths.float().rsqrt().repeat_interleave(lengths)
    token = F.cross_entropy(logits.float(), batch.labels_N, reduction="none")
    return (token * weights).sum(), float(weights.sum())
