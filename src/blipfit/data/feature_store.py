"""The feature store: image features of the frozen vision tower, computed once and saved on disk.

Shape suffixes: `B` images of a forward pass, `S` pixels per side, `P` image tokens, `D` width, `N` images of a shard.

A store is the folder `FOLDER/KEY/` with a `manifest.json` for people and shards (`feature_shard`). The key is a hash of
everything that the features depend on except the image. An image is identified by the hash of its file, so a renamed
file is still found and copies are stored once. `manage_feature_stores` lists, checks and deletes stores;
`blipfit.model.image_features` connects a model with a store.
"""

import hashlib
import json
import os
import platform
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfit import disk_space
from blipfit.data import feature_shard, images
from blipfit.data.feature_shard import Shard
from blipfit.data.image_hashes import hash_file as hash_file
from blipfit.data.image_hashes import hash_image, hash_on_white
from blipfit.data.prefetch import prefetch
from blipfit.disk_space import format_bytes as format_bytes
from blipfit.errors import UserError
from blipfit.file_writes import remove_leftovers
from blipfit.run_folder import installed_version, read_json, write_json

FORMAT = 1
# Increase the version whenever `images.resize` or `images.to_pixels` changes its result: older stores are then unused.
PREPROCESSING = {"version": 1, "resize": "bicubic, to a square", "mean": list(images.MEAN), "std": list(images.STD)}
VISION_BATCH_SIZE = 16  # images per forward pass of the vision tower
# Upper limits of a shard.
SHARD_IMAGES = 512
SHARD_BYTES = 256 * 2**20
MANIFEST = "manifest.json"
# A shard is written in seconds, so an older temporary folder of another machine belongs to a process that was killed.
LEFTOVER_SECONDS = 3600.0

ComputeFeatures = Callable[[Tensor], Tensor]
"""Pixels `B × 3 × S × S` → features `B × P × D`, any dtype and device; must be deterministic."""


def default_folder() -> Path:
    """Return the folder of all stores: `$BLIPFIT_CACHE/features`, or `~/.cache/blipfit/features`."""
    return Path(os.environ.get("BLIPFIT_CACHE") or "~/.cache/blipfit").expanduser() / "features"


@dataclass(frozen=True, slots=True)
class FeatureSpec:
    """Everything that features depend on except the image; equal specs share one store."""

    tower_sha256: str
    """SHA-256 of the vision tower's weights and settings, without the trained layer norm at its end."""
    image_size: int
    """S: pixels per side."""
    shape: tuple[int, int]
    """P × D."""
    dtype: torch.dtype
    """Stored dtype: float16 or bfloat16."""
    computation: str
    """How the tower is run, as far as it can change the last bits: device, images per pass, matmul precision."""

    def to_json(self) -> dict[str, Any]:
        """Return the spec as JSON values, as the manifest stores it."""
        return {
            "format": FORMAT,
            "tower": self.tower_sha256,
            "preprocessing": PREPROCESSING | {"size": self.image_size},
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "computing": self.computation,
        }

    @property
    def key(self) -> str:
        """The name of the store's folder: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def hash_files(paths: Iterable[Path], transparency: images.Transparency = "dropped") -> dict[str, Path]:
    """Return a mapping from image hash to the first path with that content, in the order of `paths`.

    The image hash is that of `hash_image`. Raises UserError if a file is missing or unreadable.
    """
    files: dict[str, Path] = {}
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(thread_count()) as pool:
        hashes = pool.map(lambda path: hash_image(path, transparency), unique)
        for path, image in zip(unique, hashes, strict=True):
            files.setdefault(image, path)
    return files


def estimate_bytes(count: int, shape: tuple[int, int]) -> int:
    """Return the size on disk, in bytes, of the features of `count` images; `shape` is P × D."""
    return count * (2 * shape[0] * shape[1] + feature_shard.HEADER_BYTES_PER_ROW)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Result of comparing stored features with features computed again."""

    images: int
    """Number of images compared."""
    different: list[str]
    """Hashes of the images whose features differ in at least one bit."""
    largest: float
    """Largest absolute difference of a single value."""


class FeatureStore:
    """The stored features of one spec. Any number of processes may read and build it at the same time."""

    def __init__(self, home: Path, spec: FeatureSpec):
        self.home, self.spec = home, spec
        self._shards: dict[str, Shard] = {}
        self._rows: dict[str, tuple[Shard, int]] = {}  # image hash → shard and row

    @classmethod
    def open(cls, folder: Path, spec: FeatureSpec, model: str = "") -> "FeatureStore":
        """Open the store of `spec` in a folder of stores; create it if it does not exist.

        `model` is the model's name for the manifest. Raises UserError if the store's folder is not writable, contains
        something else, or has a damaged shard.
        """
        home = folder / spec.key
        try:
            if not (home / MANIFEST).exists():
                _create(home, spec, model)
        except OSError as error:
            raise UserError(
                f"{home} cannot be written ({error.strerror}): set BLIPFIT_CACHE to a writable folder"
            ) from None
        _require_same_spec(home, spec)
        store = cls(home, spec)
        store.refresh()
        return store

    def __len__(self) -> int:
        return len(self._rows)

    def refresh(self) -> None:
        """Open the shards that were added since the last call, by this or another process."""
        for path in list_shards(self.home):
            if path.name not in self._shards:
                try:
                    self._add(feature_shard.read(path, self.spec.shape, self.spec.dtype))
                except FileNotFoundError:  # deleted since it was listed
                    continue

    def missing(self, image_hashes: Iterable[str]) -> list[str]:
        """Return the hashes, without duplicates, of the images whose features are not stored."""
        return [image for image in dict.fromkeys(image_hashes) if image not in self._rows]

    def read(self, image_hashes: Sequence[str]) -> Tensor:
        """Return the features `B × P × D` of images in the stored dtype, in pinned memory if there is a GPU.

        Raises DamagedShard if the bytes on disk are not the bytes that were written, and KeyError for an image that is
        not stored.
        """
        rows_BPD = torch.empty(
            (len(image_hashes), *self.spec.shape), dtype=self.spec.dtype, pin_memory=torch.cuda.is_available()
        )
        for image, out_PD in zip(image_hashes, rows_BPD, strict=True):
            shard, row = self._rows[image]
            shard.read(row, out_PD)
        return rows_BPD

    def prefetch(self, batches: Iterable[Sequence[str]], depth: int = 2) -> Iterator[Tensor]:
        """Yield the features of every batch in order; a thread reads up to `depth` batches in advance."""
        return prefetch(batches, self.read, depth=depth)

    def build(
        self,
        files: Mapping[str, Path],
        see: ComputeFeatures,
        batch_size: int = VISION_BATCH_SIZE,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute and store the features of all images in `files` (image hash → path) that are not stored yet.

        `see` always gets `batch_size` images; a short last batch is padded with copies, because a row's last bits can
        depend on the batch size. `progress` is called with the number of images finished since its last call. A build
        that is killed leaves complete shards, and the next build computes the rest. Raises UserError before any
        computation if the disk is too small, and later if an image is unreadable or has features too large for 16 bits.
        """
        missing = self.missing(files)
        if not missing:
            return
        remove_leftovers(self.home, seconds=LEFTOVER_SECONDS)
        _require_space(self.home, len(missing), self.spec.shape)
        with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
            pending: Future[Path] | None = None
            for chunk, rows_NPD in self._compute_shards(missing, files, see, batch_size, progress):
                if pending is not None:
                    self._open_shard(pending.result())
                pending = writer.submit(feature_shard.write, self.home, chunk, rows_NPD)
            if pending is not None:
                self._open_shard(pending.result())

    def compare(
        self, files: Mapping[str, Path], see: ComputeFeatures, batch_size: int = VISION_BATCH_SIZE
    ) -> Comparison:
        """Compute features again and compare them with the stored ones, bit by bit.

        Raises KeyError for an image that is not stored.
        """
        different, largest = [], 0.0
        for block in _split(list(files), batch_size):
            pixels = _load_pixels([(image, files[image]) for image in block], self.spec.image_size, batch_size)
            computed = see(pixels)[: len(block)].to(self.spec.dtype).cpu()
            stored = self.read(block)
            unequal = (computed.view(torch.int16) != stored.view(torch.int16)).flatten(1).any(1).tolist()
            different += [image for image, differs in zip(block, unequal, strict=True) if differs]
            largest = max(largest, float((computed.double() - stored.double()).abs().max()))
        return Comparison(len(files), different, largest)

    def _compute_shards(
        self,
        missing: Sequence[str],
        files: Mapping[str, Path],
        see: ComputeFeatures,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Iterator[tuple[list[str], Tensor]]:
        """Yield the image hashes and features `N × P × D` of each shard to write; threads decode the next images."""
        chunks = _split(missing, images_per_shard(self.spec.shape, batch_size))
        # In random order, so that two builders at the same time share the work instead of doing it twice.
        random.Random().shuffle(chunks)

        def batches_to_compute() -> Iterator[tuple[list[str], int]]:
            """Hashes of a chunk that are still missing, and the start of the next batch in them."""
            for chunk in chunks:
                self.refresh()
                remaining = self.missing(chunk)
                if len(remaining) < len(chunk):
                    progress(len(chunk) - len(remaining))
                yield from ((remaining, start) for start in range(0, len(remaining), batch_size))

        def prepare(block: tuple[list[str], int]) -> tuple[list[str], int, Tensor]:
            chunk, start = block
            block_files = [(image, files[image]) for image in chunk[start : start + batch_size]]
            return chunk, start, _load_pixels(block_files, self.spec.image_size, batch_size)

        threads = thread_count()
        for chunk, start, pixels in prefetch(batches_to_compute(), prepare, threads=threads, depth=threads):
            if start == 0:
                rows_NPD = torch.empty((len(chunk), *self.spec.shape), dtype=self.spec.dtype)
            block = chunk[start : start + batch_size]
            rows_NPD[start : start + len(block)] = self._round(see(pixels)[: len(block)], block, files)
            progress(len(block))
            if start + len(block) == len(chunk):
                yield chunk, rows_NPD

    def _round(self, features_BPD: Tensor, block: Sequence[str], files: Mapping[str, Path]) -> Tensor:
        """Return features in the stored dtype on the CPU; raise UserError if a value is not finite there."""
        assert features_BPD.shape == (len(block), *self.spec.shape), features_BPD.shape
        rounded = features_BPD.to(self.spec.dtype)
        rows = rounded.flatten(1)
        # Ten times as fast as testing every value; amax and amin both propagate NaN.
        finite = (rows.amax(1).isfinite() & rows.amin(1).isfinite()).tolist()
        if not all(finite):
            raise UserError(
                f"{files[block[finite.index(False)]]}: its features do not fit into {self.spec.dtype}: "
                "use --set data.images=off"
            )
        return rounded.cpu()

    def _open_shard(self, path: Path) -> None:
        """Open a shard that was just written."""
        if path.name not in self._shards:
            self._add(feature_shard.read(path, self.spec.shape, self.spec.dtype))

    def _add(self, shard: Shard) -> None:
        self._shards[shard.path.name] = shard
        for row, image in enumerate(shard.images):
            self._rows.setdefault(image, (shard, row))


def list_shards(home: Path) -> list[Path]:
    """Return the shard files of a store, sorted by name."""
    return sorted(path for path in home.glob(f"*{feature_shard.SUFFIX}") if not path.name.startswith("."))


def images_per_shard(shape: tuple[int, int], batch_size: int) -> int:
    """Return the number of images of a full shard; `shape` is P × D.

    It is a multiple of `batch_size`, so that a build that resumes after being killed computes the same batches.
    """
    rows = min(SHARD_IMAGES, SHARD_BYTES // (2 * shape[0] * shape[1]))
    return max(1, rows // batch_size) * batch_size


def _create(home: Path, spec: FeatureSpec, model: str) -> None:
    """Write the manifest of a new store; raise UserError if the folder contains other files."""
    home.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") and path.name != MANIFEST for path in home.iterdir()):
        raise UserError(f"{home} is not a feature store (it has no {MANIFEST}): move it away, or set BLIPFIT_CACHE")
    packages = ("blipfit", "torch", "transformers", "Pillow", "safetensors")
    write_json(
        home / MANIFEST,
        {
            "what": "image features of a frozen vision tower, kept by blipfit; safe to delete, they are computed again",
            "model": model,
            **spec.to_json(),
            "bytes_per_image": estimate_bytes(1, spec.shape),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "versions": {name.lower(): installed_version(name) for name in packages},
        },
    )


def _require_same_spec(home: Path, spec: FeatureSpec) -> None:
    manifest, expected = read_json(home / MANIFEST), spec.to_json()
    if not isinstance(manifest, dict) or any(manifest.get(name) != value for name, value in expected.items()):
        raise UserError(f"{home / MANIFEST} describes other features than its folder's name: delete {home}")


def _require_space(home: Path, count: int, shape: tuple[int, int]) -> None:
    fix = "make room, set BLIPFIT_CACHE to a folder on another disk, or use --set data.images=off"
    disk_space.require_space(home, estimate_bytes(count, shape), f"the features of {count} images", fix)


def _load_pixels(files: Sequence[tuple[str, Path]], size: int, batch_size: int) -> Tensor:
    """Load images as pixels `batch_size × 3 × S × S`; copies of the last image pad a short batch.

    `files` are pairs of image hash and path; raises UserError if a file no longer has its hash.
    """
    batch = []
    for image, path in files:
        data = images.read_image(path)
        file_hash = hashlib.sha256(data).hexdigest()
        if image not in (file_hash, hash_on_white(file_hash)):
            raise UserError(f"{path} changed while its features were computed: run the command again")
        transparency: images.Transparency = "dropped" if image == file_hash else "white"
        batch.append(images.resize(images.decode_image(data, str(path), transparency), size))
    return images.to_pixels(batch + batch[-1:] * (batch_size - len(batch)), size)


def _split(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def thread_count() -> int:
    """Return the number of threads for hashing and decoding, which wait for files or release the GIL."""
    return min(8, os.cpu_count() or 1)
