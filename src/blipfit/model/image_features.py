"""Where image features come from: computed at every step, computed once for a whole bank, or read from the store.

`B` questions, `S` pixels a side, `P` image tokens, `D` width. Features are those BEFORE the trained layer norm.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from blipfit.data import features, images
from blipfit.data.ahead import ahead
from blipfit.data.features import BLOCK, Comparison, Facts, Store
from blipfit.data.question import Question
from blipfit.model.backbone import Backbone

Mode = Literal["stored", "shared", "off"]
View = tuple[int, int]
"""(seed, epoch) of an augmentation."""

_SETTINGS = ("hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size")
"""What the vision weights do not show of how they are used."""
_THREADS = 2


class ImageFeatures:
    """Questions → image features `B × P × D` on the backbone's device.

    `off`, `shared`: computed at every call, as the tower gives them; the experiments of a bank share each call.
    `stored`: of the plain view, from the store, in its 16-bit type. There the model always sees the rounded value,
    whether it was stored long ago or a moment ago: a missing image is computed, stored, and then read.
    """

    def __init__(self, backbone: Backbone, mode: Mode, store: Store | None, announce: Callable[[str], None]):
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
        """`folder` of stores, by default `features.default_folder()`; `announce` is told what a build will take.

        In mode `stored` the vision weights are hashed: about a second for 2 GB.
        """
        store = None
        if mode == "stored":
            store = Store.open(folder or features.default_folder(), facts(backbone), backbone.name)
        return cls(backbone, mode, store, announce)

    def features(self, questions: Sequence[Question], view: View | None = None) -> Tensor:
        """Features of the questions' images, plain or in an augmented view (not in mode `stored`)."""
        self._require_plain(view)
        if self.store is not None:
            contents = _contents(questions)
            if self.store.missing(contents):
                self.prepare(questions)
            return self._on_device(self.store.read(contents))
        return self.see(self.pixels(questions, view))

    def prefetch(
        self, batches: Sequence[Sequence[Question]], view: View | None = None, depth: int = 2
    ) -> Iterator[Tensor]:
        """`features` of every batch in order; `depth` batches are read, or their pixels made, ahead in threads.

        The tower itself runs in the caller's thread. What is missing in the store is built before the first batch.
        """
        self._require_plain(view)
        if self.store is not None:
            self.prepare([question for batch in batches for question in batch])
            coming = self.store.ahead((_contents(batch) for batch in batches), depth)
            return (self._on_device(rows_BPD) for rows_BPD in coming)
        made = ahead(batches, lambda batch: self.pixels(batch, view), threads=_THREADS, depth=depth)
        return (self.see(pixels) for pixels in made)

    def prepare(self, questions: Sequence[Question], progress: Callable[[int], None] = lambda count: None) -> int:
        """Build what is missing in the store; return how many images that were (always 0 without a store).

        `announce` is told the number of images and their size first; `progress` then, how many more are done.
        """
        if self.store is None:
            return 0
        missing = self.missing(questions)
        if missing:
            size = features.told(features.size_estimate(len(missing), self.store.facts.shape))
            self.announce(f"image features: {len(missing)} images to see once, {size} in {self.store.home}")
            self.store.build(missing, self._see_block, BLOCK, progress)
        return len(missing)

    def missing(self, questions: Sequence[Question]) -> dict[str, Path]:
        """Content hash → file of the images whose features are not stored."""
        assert self.store is not None
        files = features.by_content(question.image for question in questions)
        return {image: files[image] for image in self.store.missing(files)}

    def check(self, questions: Sequence[Question]) -> Comparison:
        """Compute features again and hold them against the stored ones, bit for bit; images not stored are left out."""
        assert self.store is not None
        files = features.by_content(question.image for question in questions)
        for image in self.store.missing(files):
            del files[image]
        return self.store.compare(files, self._see_block, BLOCK)

    def pixels(self, questions: Sequence[Question], view: View | None = None) -> Tensor:
        """`B × 3 × S × S`, plain or augmented."""
        size = self.backbone.image_size
        opened = [images.open_image(question.image) for question in questions]
        if view is not None:
            seed, epoch = view
            opened = [
                images.augment(image, seed=seed, epoch=epoch, image_id=question.id, size=size)
                for image, question in zip(opened, questions, strict=True)
            ]
        return images.pixels(opened, size)

    def see(self, pixels: Tensor) -> Tensor:
        """Pixels → features, as the tower gives them."""
        return self.backbone.see(pixels.to(self.backbone.device, non_blocking=True))

    def _see_block(self, pixels: Tensor) -> Tensor:
        """The pass that fills the store: the weights' own precision, whatever the caller's autocast says."""
        with torch.autocast(self.backbone.device.type, enabled=False):
            return self.see(pixels)

    def _on_device(self, rows_BPD: Tensor) -> Tensor:
        return rows_BPD.to(self.backbone.device, non_blocking=True)

    def _require_plain(self, view: View | None) -> None:
        if view is not None and self.store is not None:
            raise ValueError("stored features are of the plain view; there is no augmented one")


def facts(backbone: Backbone) -> Facts:
    """What the features of this backbone depend on.

    Stored type: the tower's own where that has 16 bits, so nothing is rounded; float16 for a tower in fp32, which
    keeps 3 more bits of each value than bfloat16 (values beyond 65 504 are refused when a store is built).
    """
    vision = backbone.hf.vision_model
    weight = vision.embeddings.patch_embedding.weight
    P, D = vision.embeddings.position_embedding.shape[1:]
    computing = f"{backbone.device.type}, {vision.config._attn_implementation} attention, {BLOCK} images a pass"
    if weight.dtype == torch.float32:
        computing += f", {torch.get_float32_matmul_precision()} precision"
    dtype = weight.dtype if weight.dtype in (torch.float16, torch.bfloat16) else torch.float16
    return Facts(tower_fingerprint(vision), backbone.image_size, (P, D), dtype, computing)


def tower_fingerprint(vision: Any) -> str:
    """SHA-256 of a vision tower's tensors and settings, without the trained layer norm at its end."""
    tensors = {name: tensor for name, tensor in vision.state_dict().items() if not name.startswith("post_layernorm.")}
    with ThreadPoolExecutor(features.threads()) as pool:
        digests = list(pool.map(_tensor_digest, tensors.values()))
    lines = [f"{name} {digest}" for name, digest in zip(tensors, digests, strict=True)]
    lines += [f"{name} {getattr(vision.config, name)}" for name in _SETTINGS]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _tensor_digest(tensor: Tensor) -> str:
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def _contents(questions: Sequence[Question]) -> list[str]:
    return [features.content(question.image) for question in questions]
