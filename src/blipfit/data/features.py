"""The feature store: what the frozen vision tower makes of an image, computed once and kept on disk.

`B` images of a forward pass, `S` pixels a side, `P` image tokens, `D` width. A folder of stores holds one folder a
key, `FOLDER/KEY/`: `manifest.json` for people, and shards (`feature_shard`). The key stands for everything the
features depend on but the image; an image is named by its content, so a renamed file is found and a copy is stored
once. `feature_stores` looks after such folders, `blipfit.model.image_features` brings a model and a store together.
"""

import hashlib
import json
import os
import platform
import random
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfit.data import feature_shard, images
from blipfit.data.ahead import ahead
from blipfit.data.feature_shard import Shard
from blipfit.errors import UserError
from blipfit.run import installed_version, read_json, write_json

FORMAT = 1
# Raise the version whenever `images.plain` or `images.pixels` gives other pixels: stores made before are not used then.
PREPROCESSING = {"version": 1, "resize": "bicubic, to a square", "mean": list(images.MEAN), "std": list(images.STD)}
BLOCK = 16
SHARD_IMAGES = 512
SHARD_BYTES = 256 * 2**20
MANIFEST = "manifest.json"
# A temporary folder older than this was left by a builder that was killed: a shard is written in seconds.
LEFT_OVER_SECONDS = 3600.0

See = Callable[[Tensor], Tensor]
"""Pixels `B × 3 × S × S` → features `B × P × D` of any type, on any device; deterministic."""


def default_folder() -> Path:
    """`$BLIPFIT_CACHE/features`, or `~/.cache/blipfit/features`."""
    return Path(os.environ.get("BLIPFIT_CACHE") or "~/.cache/blipfit").expanduser() / "features"


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything features depend on but the image: equal facts, equal key, one store."""

    tower: str
    """SHA-256 of the vision tower's weights and settings, without the trained layer norm."""
    size: int
    """S: pixels a side."""
    shape: tuple[int, int]
    """P × D."""
    dtype: torch.dtype
    """Stored type: float16 or bfloat16."""
    computing: str
    """How the tower was run, as far as that changes last bits: device, images a pass, precision of products."""

    def record(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "tower": self.tower,
            "preprocessing": PREPROCESSING | {"size": self.size},
            "shape": list(self.shape),
            "dtype": str(self.dtype).removeprefix("torch."),
            "computing": self.computing,
        }

    @property
    def key(self) -> str:
        """16 hexadecimal digits that name the store's folder."""
        return hashlib.sha256(json.dumps(self.record(), sort_keys=True).encode()).hexdigest()[:16]


def content(path: Path) -> str:
    """SHA-256 of a file's bytes; read again only where its size, time or inode changed (within this process)."""
    try:
        stat = path.stat()
    except OSError:
        images.read_image(path)  # says what is wrong, and what to do
        raise
    return _content(path, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _content(path: Path, size: int, changed: int, inode: int) -> str:
    return hashlib.sha256(images.read_image(path)).hexdigest()


def by_content(paths: Iterable[Path]) -> dict[str, Path]:
    """Content hash → one file that has it, in the order of first appearance."""
    files: dict[str, Path] = {}
    unique = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(threads()) as pool:
        for path, image in zip(unique, pool.map(content, unique), strict=True):
            files.setdefault(image, path)
    return files


def size_estimate(count: int, shape: tuple[int, int]) -> int:
    """Bytes on disk of the features of `count` images of `P × D`."""
    return count * (2 * shape[0] * shape[1] + feature_shard.HEADER_BYTES_PER_ROW)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Stored features beside features computed again."""

    images: int
    """How many were compared."""
    different: list[str]
    """The images whose bits differ."""
    largest: float
    """The largest absolute difference of one value."""


class Store:
    """The features of one key. Any number of processes may read and build at once."""

    def __init__(self, home: Path, facts: Facts):
        self.home, self.facts = home, facts
        self._shards: dict[str, Shard] = {}
        self._where: dict[str, tuple[Shard, int]] = {}

    @classmethod
    def open(cls, folder: Path, facts: Facts, model: str = "") -> "Store":
        """The store of these facts below a folder of stores, made where there is none.

        UserError where something else lies in its place or a shard is damaged.
        """
        home = folder / facts.key
        try:
            if not (home / MANIFEST).exists():
                _begin(home, facts, model)
        except OSError as error:
            raise UserError(
                f"{home} cannot be written ({error.strerror}): set BLIPFIT_CACHE to a folder of yours"
            ) from None
        _require_same(home, facts)
        store = cls(home, facts)
        store.refresh()
        return store

    def __len__(self) -> int:
        return len(self._where)

    def refresh(self) -> None:
        """Take in shards that appeared since, other builders' too."""
        for path in shard_files(self.home):
            if path.name not in self._shards:
                try:
                    self._take(feature_shard.read(path, self.facts.shape, self.facts.dtype))
                except FileNotFoundError:  # deleted since it was listed
                    continue

    def missing(self, wanted: Iterable[str]) -> list[str]:
        """Those images, each once, whose features are not stored."""
        return [image for image in dict.fromkeys(wanted) if image not in self._where]

    def read(self, wanted: Sequence[str]) -> Tensor:
        """Features `B × P × D` in the stored type, in page-locked memory where there is a GPU.

        DamagedShard where what is on disk is not what was written. KeyError for an image that is not stored.
        """
        rows_BPD = torch.empty(
            (len(wanted), *self.facts.shape), dtype=self.facts.dtype, pin_memory=torch.cuda.is_available()
        )
        for image, into_PD in zip(wanted, rows_BPD, strict=True):
            shard, row = self._where[image]
            shard.read(row, into_PD)
        return rows_BPD

    def ahead(self, batches: Iterable[Sequence[str]], depth: int = 2) -> Iterator[Tensor]:
        """`read` of every batch in order, `depth` batches ahead of use, in a thread."""
        return ahead(batches, self.read, depth=depth)

    def build(
        self,
        files: Mapping[str, Path],
        see: See,
        batch_size: int = BLOCK,
        progress: Callable[[int], None] = lambda count: None,
    ) -> None:
        """Compute and store the features of the images (content hash → file) that are missing.

        `see` always gets `batch_size` images; a short last batch is filled up, since the numbers of a row may depend
        on how many rows there are. `progress` is called with how many more images are done. A build that is killed
        leaves whole shards, and the next one computes the rest. UserError before anything is computed where the disk
        is too small, and where an image is unreadable or gives features that 16 bits cannot hold.
        """
        todo = self.missing(files)
        if not todo:
            return
        _remove_left_overs(self.home)
        _require_space(self.home, len(todo), self.facts.shape)
        with ThreadPoolExecutor(1, thread_name_prefix="writer") as writer:
            written: Future[Path] | None = None
            for chunk, rows_NPD in self._computed(todo, files, see, batch_size, progress):
                if written is not None:
                    self._adopt(written.result())
                written = writer.submit(feature_shard.write, self.home, chunk, rows_NPD)
            if written is not None:
                self._adopt(written.result())

    def compare(self, files: Mapping[str, Path], see: See, batch_size: int = BLOCK) -> Comparison:
        """Compute features again and hold them against the stored ones, bit for bit; KeyError where not stored."""
        different, largest = [], 0.0
        for block in _split(list(files), batch_size):
            pixels = _pixels([(image, files[image]) for image in block], self.facts.size, batch_size)
            computed = see(pixels)[: len(block)].to(self.facts.dtype).cpu()
            stored = self.read(block)
            unequal = (computed.view(torch.int16) != stored.view(torch.int16)).flatten(1).any(1).tolist()
            different += [image for image, differs in zip(block, unequal, strict=True) if differs]
            largest = max(largest, float((computed.double() - stored.double()).abs().max()))
        return Comparison(len(files), different, largest)

    def _computed(
        self,
        todo: Sequence[str],
        files: Mapping[str, Path],
        see: See,
        batch_size: int,
        progress: Callable[[int], None],
    ) -> Iterator[tuple[list[str], Tensor]]:
        """The images of each shard to be written and their features, the next images prepared in threads meanwhile."""
        chunks = _split(todo, shard_rows(self.facts.shape, batch_size))
        # Each builder takes them in an order of its own: two at once share the work instead of doing it twice.
        random.Random().shuffle(chunks)

        def blocks() -> Iterator[tuple[list[str], int]]:
            for chunk in chunks:
                self.refresh()
                left = self.missing(chunk)
                if len(left) < len(chunk):
                    progress(len(chunk) - len(left))
                yield from ((left, start) for start in range(0, len(left), batch_size))

        def prepare(block: tuple[list[str], int]) -> tuple[list[str], int, Tensor]:
            chunk, start = block
            named = [(image, files[image]) for image in chunk[start : start + batch_size]]
            return chunk, start, _pixels(named, self.facts.size, batch_size)

        beside = threads()
        for chunk, start, pixels in ahead(blocks(), prepare, threads=beside, depth=beside):
            if start == 0:
                rows_NPD = torch.empty((len(chunk), *self.facts.shape), dtype=self.facts.dtype)
            block = chunk[start : start + batch_size]
            rows_NPD[start : start + len(block)] = self._rounded(see(pixels)[: len(block)], block, files)
            progress(len(block))
            if start + len(block) == len(chunk):
                yield chunk, rows_NPD

    def _rounded(self, features_BPD: Tensor, block: Sequence[str], files: Mapping[str, Path]) -> Tensor:
        """Features in the stored type; the number of images and their shape are as promised, all values finite."""
        assert features_BPD.shape == (len(block), *self.facts.shape), features_BPD.shape
        rounded = features_BPD.to(self.facts.dtype)
        rows = rounded.flatten(1)
        # Ten times as fast as looking at every value; a NaN comes through both.
        finite = (rows.amax(1).isfinite() & rows.amin(1).isfinite()).tolist()
        if not all(finite):
            raise UserError(
                f"{files[block[finite.index(False)]]}: its features do not fit into {self.facts.dtype}; "
                "use --set training.precision=bf16, or --set data.images=off"
            )
        return rounded.cpu()

    def _adopt(self, path: Path) -> None:
        """Take in a shard that was just written."""
        if path.name not in self._shards:
            self._take(feature_shard.read(path, self.facts.shape, self.facts.dtype))

    def _take(self, shard: Shard) -> None:
        self._shards[shard.path.name] = shard
        for row, image in enumerate(shard.images):
            self._where.setdefault(image, (shard, row))


def shard_files(home: Path) -> list[Path]:
    """The shards of a store, by name."""
    return sorted(path for path in home.glob(f"*{feature_shard.SUFFIX}") if not path.name.startswith("."))


def shard_rows(shape: tuple[int, int], batch_size: int) -> int:
    """Images a shard: whole batches, so that a build that goes on after a kill computes the same batches."""
    rows = min(SHARD_IMAGES, SHARD_BYTES // (2 * shape[0] * shape[1]))
    return max(1, rows // batch_size) * batch_size


def _begin(home: Path, facts: Facts, model: str) -> None:
    """Write the manifest of a new store; a folder with other things in it is refused."""
    home.mkdir(parents=True, exist_ok=True)
    if any(not path.name.startswith(".") and path.name != MANIFEST for path in home.iterdir()):
        raise UserError(f"{home} is not a feature store (it has no {MANIFEST}): move it away, or set BLIPFIT_CACHE")
    packages = ("blipfit", "torch", "transformers", "Pillow", "safetensors")
    write_json(
        home / MANIFEST,
        {
            "what": "image features of a frozen vision tower, kept by blipfit; safe to delete, they are computed again",
            "model": model,
            **facts.record(),
            "bytes_per_image": size_estimate(1, facts.shape),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
            "versions": {name.lower(): installed_version(name) for name in packages},
        },
    )


def _require_same(home: Path, facts: Facts) -> None:
    manifest, wanted = read_json(home / MANIFEST), facts.record()
    if not isinstance(manifest, dict) or any(manifest.get(name) != value for name, value in wanted.items()):
        raise UserError(f"{home / MANIFEST} describes other features than its folder's name stands for: delete {home}")


def _require_space(home: Path, count: int, shape: tuple[int, int]) -> None:
    needed, free = size_estimate(count, shape), shutil.disk_usage(home).free
    if needed > free:
        raise UserError(
            f"the features of {count} images take {told(needed)} and {home} has {told(free)} left: free some space, "
            "set BLIPFIT_CACHE to a folder on another disk, or use --set data.images=off"
        )


def _remove_left_overs(home: Path) -> None:
    """Delete the temporary folders of builders that were killed."""
    for path in home.glob(".*"):
        try:
            if path.is_dir() and time.time() - path.stat().st_mtime > LEFT_OVER_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
        except FileNotFoundError:  # another builder was quicker
            continue


def _pixels(named: Sequence[tuple[str, Path]], size: int, batch_size: int) -> Tensor:
    """Pixels `batch_size × 3 × S × S` of files whose content is known; the last image fills up a short batch."""
    opened = []
    for image, path in named:
        data = images.read_image(path)
        if hashlib.sha256(data).hexdigest() != image:
            raise UserError(f"{path} changed while features were computed: start again")
        opened.append(images.plain(images.decode_image(data, str(path)), size))
    return images.pixels(opened + opened[-1:] * (batch_size - len(opened)), size)


def _split(items: Sequence[str], size: int) -> list[list[str]]:
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def threads() -> int:
    """Threads for work that waits for files or lets others run: hashing, decoding."""
    return min(8, os.cpu_count() or 1)


def told(size: int) -> str:
    """A number of bytes for people: 707 KiB, 6.9 GiB."""
    amount, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if amount >= 100 or units[0] == "bytes" else f"{amount:.1f} {units[0]}"
