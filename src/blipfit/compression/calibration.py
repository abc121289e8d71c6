"""Calibration questions: the inputs on which importance is measured and to which the repair is fitted.

`B` questions, `P` image tokens, `D` width.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blipfit.data.batches import EncodedQuestion, TargetBatch
from blipfit.data.prompts import get_prompt
from blipfit.data.question import Question
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures

BATCH_SIZE = 16


@dataclass(frozen=True, slots=True)
class Calibration:
    """Calibration questions in batches of similar length, with their image features, on the backbone's device."""

    batches: tuple[tuple[Tensor, TargetBatch], ...]
    """Image features `B × P × D` and encoded texts of each batch."""

    @classmethod
    def from_questions(
        cls, backbone: Backbone, questions: Sequence[Question], prompt_name: str, image_features: ImageFeatures
    ) -> "Calibration":
        """Encode questions as training does, with the prompt of that name (see `data.prompts`)."""
        encoded = backbone.text.encode([get_prompt(prompt_name)(question) for question in questions])
        return cls.from_encoded(
            backbone, encoded, lambda indices: image_features.features([questions[index] for index in indices])
        )

    @classmethod
    def from_encoded(
        cls, backbone: Backbone, encoded: Sequence[EncodedQuestion], load_features: Callable[[list[int]], Tensor]
    ) -> "Calibration":
        """Batch encoded questions; `load_features(indices)` returns their image features `B × P × D`."""
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index].qformer))
        batches = []
        for start in range(0, len(order), BATCH_SIZE):
            indices = order[start : start + BATCH_SIZE]
            target = backbone.text.targets([encoded[index] for index in indices]).to(backbone.device)
            batches.append((load_features(indices), target))
        return cls(tuple(batches))

    def __iter__(self) -> Iterator[tuple[Tensor, TargetBatch]]:
        return iter(self.batches)

    def __len__(self) -> int:
        """Return the number of questions, not of batches."""
        return sum(len(features) for features, _ in self.batches)


def sample_questions(questions: Sequence[Question], count: int, seed: int = 0) -> list[Question]:
    """Sample `count` questions without replacement, in their original order; all where there are fewer."""
    order = torch.randperm(len(questions), generator=torch.Generator().manual_seed(seed)).tolist()
    return [questions[index] for index in sorted(order[:count])]
