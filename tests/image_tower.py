"""Run a model's vision tower image by image, and compare and count what it computes."""

from collections.abc import Callable
from pathlib import Path

import torch

from blipfit.data import images
from blipfit.model.backbone import Backbone


def compute_features(tower: Backbone, paths: list[Path]) -> torch.Tensor:
    """Compute the features of each image in a pass of its own, not rounded."""
    size = tower.image_size
    return torch.cat([tower.see(images.to_pixels([images.open_image(path)], size)) for path in paths])


def has_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    """Return whether two 16-bit tensors are equal in dtype, shape and every bit."""
    return actual.dtype == expected.dtype and torch.equal(actual.view(torch.int16), expected.view(torch.int16))


def count_images(tower: Backbone) -> tuple[Callable[[torch.Tensor], torch.Tensor], list[int]]:
    """Return the tower's `see` and a list to which each of its calls adds its number of images."""
    counts: list[int] = []

    def see(pixels: torch.Tensor) -> torch.Tensor:
        counts.append(len(pixels))
        return tower.see(pixels)

    return see, counts
