"""CLIP score of image-text pairs: 100 × max(cosine similarity, 0) of their CLIP embeddings.

Source: Hessel et al., 2021, with the factor 100 that is in use today. Shapes: `B` pairs of a batch, `T` text tokens.
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
    """CLIP scores of pairs, each 0 to 100, in the order of the pairs."""

    values: tuple[float, ...]
    truncated_texts: int
    """Number of texts that were longer than CLIP's maximum length."""


def score(clip: Clip, images: Sequence[Path | Image.Image], texts: Sequence[str], batch_size: int = 32) -> ClipScores:
    """Score each image with the text at the same index.

    Texts that are longer than CLIP's maximum length are truncated and counted.
    """
    pairs = list(zip(images, texts, strict=True))
    values: list[float] = []
    truncated_texts = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ids, truncated = _tokenize(clip, [text for _, text in batch])
        truncated_texts += truncated
        values += _cosine_similarities(clip, _load_pixels(clip, [image for image, _ in batch]), ids).tolist()
    return ClipScores(tuple(100 * max(value, 0.0) for value in values), truncated_texts)


def _tokenize(clip: Clip, texts: list[str]) -> tuple[Tensor, int]:
    """Return token ids `B × T` and the number of truncated texts; a truncated text keeps its end token."""
    limit = clip.text_length
    rows = clip.tokenizer(texts, truncation=False, verbose=False).input_ids
    ids = clip.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt").input_ids
    return ids, sum(len(row) > limit for row in rows)


def _load_pixels(clip: Clip, images: list[Path | Image.Image]) -> Tensor:
    pictures = [open_image(image) if isinstance(image, Path) else image for image in images]
    return clip.processor(pictures, return_tensors="pt").pixel_values


@torch.no_grad()
def _cosine_similarities(clip: Clip, pixels: Tensor, ids: Tensor) -> Tensor:
    device = clip.model.device
    # No attention mask is needed: attention is causal and CLIP pools at the end token, which is before the padding.
    texts = clip.model.get_text_features(input_ids=ids.to(device)).pooler_output
    images = clip.model.get_image_features(pixel_values=pixels.to(device)).pooler_output
    return torch.nn.functional.cosine_similarity(images, texts).cpu()
