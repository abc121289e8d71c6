"""CLIP score of image-text pairs: 100 × max(cosine similarity, 0) of their CLIP embeddings.

Source: Hessel et al., 2021, with the factor 100 that is in use today. Two means over a data set are in use, and they
differ if a cosine is negative: `mean_of_clamped` (Hessel et al.; the value that blipfit prints) clamps every pair at 0
before the mean, `clamped_mean` (torchmetrics) clamps the mean. Shapes: `B` pairs of a batch, `T` text tokens.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from blipfit.data.images import Transparency, open_image
from blipfit.errors import UserError
from blipfit.model.clip import Clip


@dataclass(frozen=True, slots=True)
class ClipScores:
    """CLIP scores of pairs, each 0 to 100, in the order of the pairs."""

    values: tuple[float, ...]
    truncated_texts: int
    """Number of texts that were longer than CLIP's maximum length."""
    cosines: tuple[float, ...] = ()
    """100 × cosine similarity of the pairs, each -100 to 100; `values` are these, clamped at 0."""

    @property
    def mean_of_clamped(self) -> float | None:
        """Mean over the pairs of 100 × max(cosine, 0), as in Hessel et al.; None without pairs."""
        return math.fsum(self.values) / len(self.values) if self.values else None

    @property
    def clamped_mean(self) -> float | None:
        """100 × max(mean cosine over the pairs, 0), as in torchmetrics; None without pairs."""
        return max(math.fsum(self.cosines) / len(self.cosines), 0.0) if self.cosines else None


def score(
    clip: Clip,
    images: Sequence[Path | Image.Image],
    texts: Sequence[str],
    batch_size: int = 32,
    transparency: Sequence[Transparency] | None = None,
) -> ClipScores:
    """Score each image with the text at the same index.

    Texts that are longer than CLIP's maximum length are truncated and counted. `transparency`: how the transparent
    pixels of each file are shown; None shows all on white. Raises UserError if a score is NaN or infinite.
    """
    modes: Sequence[Transparency] = ["white"] * len(images) if transparency is None else transparency
    pairs = list(zip(zip(images, modes, strict=True), texts, strict=True))
    cosines: list[float] = []
    truncated_texts = 0
    for start in range(0, len(pairs), batch_size):
        batch = pairs[start : start + batch_size]
        ids, truncated = _tokenize(clip, [text for _, text in batch])
        truncated_texts += truncated
        cosines += _cosine_similarities(clip, _load_pixels(clip, [image for image, _ in batch]), ids).tolist()
    for number, (cosine, (_, text)) in enumerate(zip(cosines, pairs, strict=True), start=1):
        if not math.isfinite(cosine):
            raise UserError(
                f"the CLIP score of pair {number} ({text[:40]!r}) is {cosine}; use a CLIP whose weights are all finite"
            )
    values = tuple(100 * max(cosine, 0.0) for cosine in cosines)
    return ClipScores(values, truncated_texts, tuple(100 * cosine for cosine in cosines))


def _tokenize(clip: Clip, texts: list[str]) -> tuple[Tensor, int]:
    """Return token ids `B × T` and the number of truncated texts; a truncated text keeps its end token."""
    limit = clip.text_length
    rows = clip.tokenizer(texts, truncation=False, verbose=False).input_ids
    ids = clip.tokenizer(texts, truncation=True, max_length=limit, padding=True, return_tensors="pt").input_ids
    return ids, sum(len(row) > limit for row in rows)


def _load_pixels(clip: Clip, images: list[tuple[Path | Image.Image, Transparency]]) -> Tensor:
    opened = [open_image(image, mode) if isinstance(image, Path) else image for image, mode in images]
    return clip.processor(opened, return_tensors="pt").pixel_values


@torch.no_grad()
def _cosine_similarities(clip: Clip, pixels: Tensor, ids: Tensor) -> Tensor:
    device = clip.model.device
    # No attention mask is needed: attention is causal and CLIP pools at the end token, which is before the padding.
    texts = clip.model.get_text_features(input_ids=ids.to(device)).pooler_output
    images = clip.model.get_image_features(pixel_values=pixels.to(device)).pooler_output
    return torch.nn.functional.cosine_similarity(images, texts).cpu()
