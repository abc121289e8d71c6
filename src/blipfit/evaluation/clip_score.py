"""CLIP score (Hessel et al., 2021, in the form in use today): 100 × max(cosine, 0) of image and text, by a CLIP.

Shapes: B pairs of a batch, T text tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blipfit.data.images import open_image
from blipfit.model.clip import Clip


@dataclass(frozen=True, slots=True)
class ClipScores:
    """Scores of pairs in their order, each 0 to 100, and how many texts were longer than the model reads."""

    values: tuple[float, ...]
    cut: int


def score(clip: Clip, images: Sequence[Path | Image.Image], texts: Sequence[str], batch_size: int = 32) -> ClipScores:
    """Score each image with its own text; a text longer than the model reads is cut, and counted."""
    pairs = list(zip(images, texts, strict=True))
    values: list[float] = []
    cut = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ids, longer = _tokens(clip, [text for _, text in batch])
        cut += longer
        values += _cosines(clip, _pixels(clip, [image for image, _ in batch]), ids).tolist()
    return ClipScores(tuple(100 * max(value, 0.0) for value in values), cut)


def _tokens(clip: Clip, texts: list[str]) -> tuple[Tensor, int]:
    """Token ids `B × T`, an end token after each text also where it was cut; and how many were."""
    limit = clip.text_length
    rows = clip.tokenizer(texts, truncation=False, verbose=False).input_ids
    ids = clip.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt").input_ids
    return ids, sum(len(row) > limit for row in rows)


def _pixels(clip: Clip, images: list[Path | Image.Image]) -> Tensor:
    opened = [open_image(image) if isinstance(image, Path) else image for image in images]
    return clip.processor(opened, return_tensors="pt").pixel_values


@torch.no_grad()
def _cosines(clip: Clip, pixels: Tensor, ids: Tensor) -> Tensor:
    device = clip.model.device
    # No attention mask: attention is causal and a text is read at its end token, so the padding is not seen.
    texts = clip.model.get_text_features(input_ids=ids.to(device)).pooler_output
    images = clip.model.get_image_features(pixel_values=pixels.to(device)).pooler_output
    return torch.nn.functional.cosine_similarity(images, texts).cpu()
