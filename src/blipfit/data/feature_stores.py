"""A folder of feature stores, looked after: listed, described, checked, deleted. No model is needed for any of it."""

import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blipfit.data import feature_shard
from blipfit.data.feature_shard import DamagedShard
from blipfit.data.features import MANIFEST, shard_files
from blipfit.errors import UserError
from blipfit.run import read_json


@dataclass(frozen=True, slots=True)
class Description:
    """One store, from its manifest and the headers of its shards."""

    home: Path
    model: str
    """Name of the model that began it; others with the same tower share it."""
    shape: tuple[int, int]
    """P image tokens × D width."""
    dtype: str
    computing: str
    created: str
    images: int
    shards: int
    bytes: int
    damaged: list[str]
    """Shards that cannot be opened, each with its reason."""

    @property
    def key(self) -> str:
        return self.home.name


@dataclass(slots=True)
class Check:
    """What reading every byte of a store found."""

    images: int = 0
    """Rows that hold what was written."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Shards that do not, with the reason."""


def list_stores(folder: Path) -> list[Description]:
    """Every store below a folder, by key; none where there is no such folder."""
    return [describe(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]


def find(folder: Path, key: str) -> Path:
    """The store whose key begins with `key`."""
    keys = sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}"))
    found = [name for name in keys if key and name.startswith(key)]
    if len(found) != 1:
        what = "is the beginning of several keys" if found else "is no key"
        raise UserError(f"{key!r} {what} in {folder}; there are: {', '.join(found or keys) or 'none'}")
    return folder / found[0]


def describe(home: Path) -> Description:
    """What a store holds; UserError where the folder is none."""
    manifest, shape, dtype = _manifest(home)
    count, damaged = 0, []
    files = shard_files(home)
    for path in files:
        try:
            count += len(feature_shard.read(path, shape, dtype).images)
        except DamagedShard as error:
            damaged.append(f"{path.name}: {error.reason}")
    return Description(
        home=home,
        model=manifest["model"],
        shape=shape,
        dtype=manifest["dtype"],
        computing=manifest["computing"],
        created=manifest["created"],
        images=count,
        shards=len(files),
        bytes=sum(path.stat().st_size for path in files),
        damaged=damaged,
    )


def check(home: Path, repair: bool = False, progress: Callable[[int], None] = lambda count: None) -> Check:
    """Read every row and hold it against its checksum; `progress` is called with how many more images were read.

    `repair` deletes damaged shards: the next build computes their images again. Whether a tower of today gives the
    stored numbers is another question (`blipfit.model.image_features.ImageFeatures.check`).
    """
    _, shape, dtype = _manifest(home)
    found = Check()
    row_PD = torch.empty(shape, dtype=dtype)
    for path in shard_files(home):
        try:
            shard = feature_shard.read(path, shape, dtype)
            for row in range(len(shard.images)):
                shard.read(row, row_PD)
                progress(1)
            found.images += len(shard.images)
        except DamagedShard as error:
            found.damaged[path] = error.reason
            if repair:
                path.unlink()
    return found


def delete(home: Path) -> int:
    """Delete a store; returns the bytes of its shards. UserError where the folder is none.

    A process that reads it at the moment keeps what it has mapped.
    """
    _manifest(home)
    freed = sum(path.stat().st_size for path in shard_files(home))
    # Out of sight in one step, so that nobody opens half a store.
    holder = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
    os.replace(home, holder / home.name)
    shutil.rmtree(holder)
    return freed


def _manifest(home: Path) -> tuple[dict[str, Any], tuple[int, int], torch.dtype]:
    """A store's manifest, and from it P × D and the stored type."""
    if not (home / MANIFEST).is_file():
        raise UserError(f"{home} is not a feature store (it has no {MANIFEST})")
    manifest = read_json(home / MANIFEST)
    try:
        P, D = manifest["shape"]
        dtype = {"float16": torch.float16, "bfloat16": torch.bfloat16}[manifest["dtype"]]
        for name in ("model", "computing", "created"):
            manifest[name]
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{home / MANIFEST} is not the manifest of a feature store: delete {home}") from None
    return manifest, (P, D), dtype
