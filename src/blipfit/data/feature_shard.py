"""One file of stored image features: it appears whole, is memory-mapped, and every row is checked when first read.

`N` images, `P` image tokens, `D` width. The file is safetensors: one 16-bit tensor `N × P × D`, and in the header's
metadata which image each row belongs to. So a shard needs no index beside it that could disagree with it.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit.errors import UserError
from blipfit.run import replacing

SUFFIX = ".safetensors"
_TENSOR = "features"
# The header's text for a row: 64 digits of SHA-256, a colon, 8 of CRC-32, a blank.
HEADER_BYTES_PER_ROW = 74


class DamagedShard(UserError):
    """A shard that does not hold what was written into it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}): delete it, and its images are computed again")
        self.path, self.reason = path, reason


@dataclass(slots=True)
class Shard:
    """A shard open for reading: `rows_NPD` is mapped, nothing of it is in memory before it is read."""

    path: Path
    images: list[str]
    """SHA-256 of the image file's bytes, one a row."""
    checksums: list[int]
    """CRC-32 of each row's bytes."""
    rows_NPD: Tensor
    unchecked: set[int] = field(default_factory=set)

    def read(self, row: int, into_PD: Tensor) -> None:
        """Copy one row; on its first reading DamagedShard where its bytes are not those written."""
        into_PD.copy_(self.rows_NPD[row])
        if row in self.unchecked:
            # What was copied is what is checked, so nothing can come in between.
            if checksum(into_PD) != self.checksums[row]:
                raise DamagedShard(self.path, f"the features of row {row} are not those written")
            self.unchecked.discard(row)


def name(images: Sequence[str]) -> str:
    """The file name of a shard: equal images in equal order, equal name, so that two builders write one file."""
    return hashlib.sha256("\n".join(images).encode()).hexdigest()[:16] + SUFFIX


def checksum(row_PD: Tensor) -> int:
    return zlib.crc32(row_PD.contiguous().view(torch.uint8).numpy())


def write(folder: Path, images: Sequence[str], rows_NPD: Tensor) -> Path:
    """Write a shard whole, through to the disk; UserError where the disk will not take it."""
    path = folder / name(images)
    # One entry, since safetensors writes several in an order of its own: equal shards are equal files.
    listed = (f"{image}:{checksum(row):08x}" for image, row in zip(images, rows_NPD, strict=True))
    metadata = {"rows": " ".join(listed)}
    try:
        with replacing(path) as temporary:
            save_file({_TENSOR: rows_NPD}, temporary, metadata)
            # Without this a power failure can leave a file of the right name and length with nothing in it.
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}): free some space, or set BLIPFIT_CACHE to a folder on another disk; "
            "what is stored already is kept"
        ) from None
    return path


def read(path: Path, shape_PD: tuple[int, int], dtype: torch.dtype) -> Shard:
    """Map a shard; DamagedShard where it is cut off or not of this shape and type. FileNotFoundError passes."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            rows_NPD = file.get_tensor(_TENSOR)
        listed = [entry.split(":") for entry in metadata["rows"].split()]
        images, checksums = [image for image, _ in listed], [int(text, 16) for _, text in listed]
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedShard(path, " ".join(str(error).split())) from None
    if name(images) != path.name:
        raise DamagedShard(path, "its list of images is not the one its name stands for")
    wanted = (len(images), *shape_PD)
    if tuple(rows_NPD.shape) != wanted or rows_NPD.dtype != dtype:
        found = f"{tuple(rows_NPD.shape)} {rows_NPD.dtype}"
        raise DamagedShard(path, f"it holds {found} where {wanted} {dtype} belongs")
    return Shard(path, images, checksums, rows_NPD, set(range(len(images))))
