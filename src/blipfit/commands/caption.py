"""`blipfit caption`: one sentence per image."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from blipfit import inference


def run(model: inference.Model, images: Sequence[Path], decoding: str) -> list[dict[str, str]]:
    """Describe every image. Raises UserError if an image cannot be read or the decoding is unknown."""
    texts = model.captions(images, decoding)
    return [{"image": str(image), "caption": text} for image, text in zip(images, texts, strict=True)]


def render(records: Sequence[Mapping[str, str]]) -> list[str]:
    """One line per image."""
    return [f"{record['image']}: {record['caption']}" for record in records]
