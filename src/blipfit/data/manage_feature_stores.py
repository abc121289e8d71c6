"""List, summarize, check and delete the feature stores of a folder; none of it needs a model."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from blipfit.data import feature_shard
from blipfit.data.feature_shard import DamagedShard
from blipfit.data.feature_store import MANIFEST, list_shards
from blipfit.errors import UserError
from blipfit.file_writes import temporary_folder
from blipfit.run_folder import read_json


@dataclass(frozen=True, slots=True)
class StoreSummary:
    """What one store contains, read from its manifest and the headers of its shards."""

    home: Path
    model: str
    """Name of the model that created the store; other models with the same vision tower share it."""
    shape: tuple[int, int]
    """P image tokens × D width."""
    dtype: str
    """Stored dtype: float16 or bfloat16."""
    computing: str
    """How the tower was run: device, attention implementation, images per forward pass."""
    created: str
    """Time of creation, UTC, as `2026-01-31T12:00:00Z`."""
    images: int
    shards: int
    bytes: int
    """Size of all shards on disk."""
    damaged: list[str]
    """Shards that cannot be opened, as `FILE NAME: REASON`."""

    @property
    def key(self) -> str:
        """The key that names the store's folder."""
        return self.home.name


@dataclass(slots=True)
class CheckResult:
    """Result of reading and verifying every byte of a store."""

    images: int = 0
    """Number of images in undamaged shards."""
    damaged: dict[Path, str] = field(default_factory=dict)
    """Damaged shards, each with the reason."""


def list_stores(folder: Path) -> list[StoreSummary]:
    """Return the summaries of all stores in a folder, sorted by key; an empty list if the folder does not exist."""
    return [summarize(manifest.parent) for manifest in sorted(folder.glob(f"*/{MANIFEST}"))]


def find(folder: Path, key: str) -> Path:
    """Return the folder of the store whose key starts with `key`.

    Raises UserError if no key or more than one starts with it.
    """
    keys = sorted(manifest.parent.name for manifest in folder.glob(f"*/{MANIFEST}"))
    matches = [name for name in keys if key and name.startswith(key)]
    if len(matches) != 1:
        problem = "is the start of several keys" if matches else "is not a key"
        raise UserError(f"{key!r} {problem} in {folder}; keys there: {', '.join(matches or keys) or 'none'}")
    return folder / matches[0]


def summarize(home: Path) -> StoreSummary:
    """Return what the store in the folder `home` contains.

    Raises UserError if `home` is not a feature store.
    """
    manifest, shape, dtype = _manifest(home)
    count, damaged = 0, []
    files = list_shards(home)
    for path in files:
        try:
            count += len(feature_shard.read(path, shape, dtype).images)
        except DamagedShard as error:
            damaged.append(f"{path.name}: {error.reason}")
    return StoreSummary(
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


def check(home: Path, repair: bool = False, progress: Callable[[int], None] = lambda count: None) -> CheckResult:
    """Read every row of a store and verify its checksum.

    `progress` is called with the number of images read since its last call. `repair` deletes damaged shards; the next
    build computes their images again. Whether the vision tower still computes the stored numbers is checked by
    `blipfit.model.image_features.ImageFeatures.check` instead. Raises UserError if `home` is not a feature store.
    """
    _, shape, dtype = _manifest(home)
    result = CheckResult()
    row_PD = torch.empty(shape, dtype=dtype)
    for path in list_shards(home):
        try:
            shard = feature_shard.read(path, shape, dtype)
            for row in range(len(shard.images)):
                shard.read(row, row_PD)
                progress(1)
            result.images += len(shard.images)
        except DamagedShard as error:
            result.damaged[path] = error.reason
            if repair:
                path.unlink()
    return result


def delete(home: Path) -> int:
    """Delete a store and return the size of its shards in bytes.

    A process that has the store open can still read the shards that it has mapped. Raises UserError if `home` is not a
    feature store.
    """
    _manifest(home)
    freed = sum(path.stat().st_size for path in list_shards(home))
    # Moved away by one rename, so that no other process opens a partly deleted store.
    with temporary_folder(home) as trash:
        os.replace(home, trash / home.name)
    return freed


def _manifest(home: Path) -> tuple[dict[str, Any], tuple[int, int], torch.dtype]:
    """Read a store's manifest; return it with the shape P × D and the stored dtype."""
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
