"""Calibration questions: what a model is shown while its parts are measured and repaired.

`B` questions, `P` image tokens, `S` query and text tokens of the Q-Former, `D` width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blipfit.data.batches import Encoded, TargetBatch
from blipfit.data.prompts import prompt
from blipfit.data.question import Question
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures

BATCH = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Questions in batches of similar length, with their image features; all on the backbone's device."""

    batches: tuple[tuple[Tensor, TargetBatch], ...]

    def __iter__(self) -> Iterator[tuple[Tensor, TargetBatch]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return sum(len(features) for features, _ in self.batches)


def draw(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """`count` questions by lot, or all where there are fewer."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [questions[i] for i in sorted(order[:count])]


def prepare(
    backbone: Backbone, questions: Sequence[Question], asked: str, image_features: ImageFeatures
) -> Calibration:
    """Questions, written with the prompt `asked`, as the model will read them in training."""
    encoded = backbone.text.encode([prompt(asked)(question) for question in questions])
    return of_encoded(backbone, encoded, lambda indices: image_features.features([questions[i] for i in indices]))


def of_encoded(backbone: Backbone, encoded: Sequence[Encoded], features) -> Calibration:  # type: ignore[no-untyped-def]
    """Batches of encoded questions; `features(indices)` gives image features `B × P × D`."""
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i].qformer))
    batches = []
    for start in range(0, len(order), BATCH):
        chosen = order[start : start + BATCH]
        target = backbone.text.targets([encoded[i] for i in chosen]).to(backbone.device)
        batches.append((features(chosen), target))
    return Calibration(tuple(batches))
