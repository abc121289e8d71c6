"""Image features of questions: computed at every step, computed once for a whole bank, or read from a feature store.

`B` questions, `S` pixels per side, `P` image tokens, `D` width. Image features are the vision tower's outputs BEFORE
the trained layer norm.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from blipfit.data import feature_store, images
from blipfit.data.feature_store import VISION_BATCH_SIZE, Comparison, FeatureSpec, FeatureStore
from blipfit.data.image_hashes import hash_image
from blipfit.data.prefetch import prefetch
from blipfit.data.question import Question
from blipfit.model import checkpoint_files
from blipfit.model.backbone import Backbone

Mode = Literal["stored", "shared", "off"]
View = tuple[int, int]
"""Seed and epoch of an augmentation."""

_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size")
"""Settings of the vision tower that change its features and that its weights do not contain."""
_THREADS = 2
"""Threads that decode images ahead of the tower."""


class ImageFeatures:
    """Questions → image features `B × P × D` on the backbone's device.

    Modes `off` and `shared`: computed at every call, in the tower's dtype; the experiments of a bank share each call.
    Mode `stored`: without augmentation, read from a feature store in its 16-bit dtype. The features of a missing image
    are computed, stored and then read, so the model always gets the rounded values.
    """

    def __init__(self, backbone: Backbone, mode: Mode, store: FeatureStore | None, announce: Callable[[str], None]):
        assert (store is not None) == (mode == "stored")
        self.backbone, self.mode, self.store, self.announce = backbone, mode, store, announce

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone,
        mode: Mode = "off",
        folder: Path | None = None,
        announce: Callable[[str], None] = lambda sentence: None,
    ) -> "ImageFeatures":
        """Create the image features of a backbone, in mode `stored` with its feature store.

        `folder`: where feature stores are, by default `feature_store.default_folder()`. `announce(sentence)` is called
        before features are computed for the store, with their number and size. In mode `stored` the vision weights are
        hashed, which takes about a second for 2 GB.
        """
        store = None
        if mode == "stored":
            store = FeatureStore.open(folder or feature_store.default_folder(), feature_spec(backbone), backbone.name)
        return cls(backbone, mode, store, announce)

    @classmethod
    def for_evaluation(cls, backbone: Backbone, mode: Mode, folder: Path | None = None) -> "ImageFeatures":
        """Create the image features for validation and test: from the store, unless a recipe's `data.images` is `off`.

        Evaluation never augments images, so its features can always be stored.
        """
        return cls.from_backbone(backbone, "off" if mode == "off" else "stored", folder)

    def features(self, questions: Sequence[Question], view: View | None = None) -> Tensor:
        """Return the features of the questions' images, augmented if `view` is given.

        Raises ValueError for an augmented view in mode `stored`.
        """
        self._check_view(view)
        if self.store is not None:
            hashes = _hash_images(questions)
            if self.store.missing(hashes):
                self.prepare(questions)
            return self._to_device(self.store.read(hashes))
        return self.see(self.pixels(questions, view))

    def prefetch(
        self, batches: Sequence[Sequence[Question]], view: View | None = None, depth: int = 2
    ) -> Iterator[Tensor]:
        """Yield the features of every batch in order, and prepare the next `depth` batches in threads.

        The threads read stored features, or images and their pixels; the tower runs in the caller's thread. Features
        that the store lacks are computed before the first batch.
        """
        self._check_view(view)
        if self.store is not None:
            self.prepare([question for batch in batches for question in batch])
            stored = self.store.prefetch((_hash_images(batch) for batch in batches), depth)
            return (self._to_device(rows_BPD) for rows_BPD in stored)
        pixel_batches = prefetch(batches, lambda batch: self.pixels(batch, view), threads=_THREADS, depth=depth)
        return (self.see(pixels) for pixels in pixel_batches)

    def prepare(self, questions: Sequence[Question], progress: Callable[[int], None] = lambda count: None) -> int:
        """Compute and store the features that the store lacks; return their number (0 without a store).

        `progress(count)` is called after each batch with its number of images.
        """
        if self.store is None:
            return 0
        missing = self.missing(questions)
        if missing:
            size = feature_store.format_bytes(feature_store.estimate_bytes(len(missing), self.store.spec.shape))
            self.announce(f"image features: {len(missing)} images to compute once, {size} in {self.store.home}")
            self.store.build(missing, self._see_without_autocast, VISION_BATCH_SIZE, progress)
        return len(missing)

    def missing(self, questions: Sequence[Question]) -> dict[str, Path]:
        """Return the images whose features are not stored: hash of the content → file."""
        assert self.store is not None
        files = _hash_files(questions)
        if self.store.missing(files):
            self.store.refresh()  # another process may have computed them
        return {image: files[image] for image in self.store.missing(files)}

    def check(self, questions: Sequence[Question]) -> Comparison:
        """Compute stored features again and compare them bit for bit; images that are not stored are skipped."""
        assert self.store is not None
        files = _hash_files(questions)
        for image in self.store.missing(files):
            del files[image]
        return self.store.compare(files, self._see_without_autocast, VISION_BATCH_SIZE)

    def pixels(self, questions: Sequence[Question], view: View | None = None) -> Tensor:
        """Return the pixels `B × 3 × S × S` of the questions' images, augmented if `view` is given."""
        size = self.backbone.image_size

        def load(question: Question) -> Image.Image:
            image = images.open_image(question.image, question.transparency)
            if view is None:
                return images.resize(image, size)
            seed, epoch = view
            return images.augment(image, seed=seed, epoch=epoch, image_id=question.id, size=size)

        return images.to_pixels([load(question) for question in questions], size)

    def see(self, pixels: Tensor) -> Tensor:
        """Pixels `B × 3 × S × S` → features in the tower's dtype."""
        return self.backbone.see(pixels.to(self.backbone.device, non_blocking=True))

    def _see_without_autocast(self, pixels: Tensor) -> Tensor:
        """Compute features for the store: in the precision of the weights, also inside a caller's autocast."""
        with torch.autocast(self.backbone.device.type, enabled=False):
            return self.see(pixels)

    def _to_device(self, rows_BPD: Tensor) -> Tensor:
        return rows_BPD.to(self.backbone.device, non_blocking=True)

    def _check_view(self, view: View | None) -> None:
        if view is not None and self.store is not None:
            raise ValueError("stored features have no augmented view; use another mode of image features")


def feature_spec(backbone: Backbone) -> FeatureSpec:
    """Return everything on which the features of this backbone depend.

    Features are stored in float16, which keeps 3 more bits of each value than bfloat16 (a store refuses values beyond
    65 504). The computation names the dtype of autocast and that of the residual stream.
    """
    vision = backbone.hf.vision_model
    P, D = vision.embeddings.position_embedding.shape[1:]
    computation = (
        f"{backbone.device.type}, {vision.config._attn_implementation} attention, {VISION_BATCH_SIZE} images a pass"
    )
    if (dtype := backbone.tower_dtype) is None:
        computation += f", {torch.get_float32_matmul_precision()} precision"
    else:
        computation += f", autocast {str(dtype).removeprefix('torch.')}, residual stream float32"
    return FeatureSpec(tower_fingerprint(vision), backbone.image_size, (P, D), torch.float16, computation)


def tower_fingerprint(vision: Any) -> str:
    """Return the SHA-256 of a vision tower's tensors and settings, without the trained layer norm at its end."""
    tensors = {name: tensor for name, tensor in vision.state_dict().items() if not name.startswith("post_layernorm.")}
    with ThreadPoolExecutor(feature_store.thread_count()) as pool:
        digests = list(pool.map(checkpoint_files.hash_tensor, tensors.values()))
    lines = [f"{name} {digest}" for name, digest in zip(tensors, digests, strict=True)]
    lines += [f"{name} {getattr(vision.config, name)}" for name in _SETTINGS]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _hash_images(questions: Sequence[Question]) -> list[str]:
    return [hash_image(question.image, question.transparency) for question in questions]


def _hash_files(questions: Sequence[Question]) -> dict[str, Path]:
    """Return a mapping from the image hashes of questions to files."""
    files: dict[str, Path] = {}
    for transparency in dict.fromkeys(question.transparency for question in questions):
        paths = (question.image for question in questions if question.transparency == transparency)
        files |= feature_store.hash_files(paths, transparency)
    return files
