"""One file (shard) of stored image features: written atomically, memory-mapped, every row verified at its first read.

`N` images, `P` image tokens, `D` width. The file is in safetensors format: one 16-bit tensor `N × P × D`. The header's
metadata names the image of each row, so there is no separate index file that could disagree with the shard.
"""

import hashlib
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit.errors import UserError
from blipfit.file_writes import replacing

SUFFIX = ".safetensors"
_TENSOR = "features"
# Header text per row: 64 hexadecimal digits of SHA-256, a colon, 8 digits of CRC-32, a space.
HEADER_BYTES_PER_ROW = 74


class DamagedShard(UserError):
    """A shard file does not contain what was written into it."""

    def __init__(self, path: Path, reason: str):
        super().__init__(f"{path} is damaged ({reason}): delete it, and its images are computed again")
        self.path, self.reason = path, reason


@dataclass(slots=True)
class Shard:
    """A shard opened for reading; `rows_NPD` is memory-mapped and loaded from disk only where it is read."""

    path: Path
    images: list[str]
    """SHA-256 of the image file's bytes, one per row."""
    checksums: list[int]
    """CRC-32 of each row's bytes."""
    rows_NPD: Tensor
    unchecked: set[int] = field(default_factory=set)
    """Indices of the rows whose checksum has not been verified yet."""

    def read(self, row: int, out_PD: Tensor) -> None:
        """Copy one row into `out_PD`; the first read of a row verifies its checksum.

        Raises DamagedShard if the bytes are not the bytes that were written.
        """
        out_PD.copy_(self.rows_NPD[row])
        if row in self.unchecked:
            # The copy is verified, not the mapped file: the file could change between the check and the copy.
            if checksum(out_PD) != self.checksums[row]:
                raise DamagedShard(self.path, f"the features of row {row} do not match their checksum")
            self.unchecked.discard(row)


def shard_name(images: Sequence[str]) -> str:
    """Return the file name of a shard, a hash of its image hashes in order: two builders of it write one file."""
    return hashlib.sha256("\n".join(images).encode()).hexdigest()[:16] + SUFFIX


def checksum(row_PD: Tensor) -> int:
    """Return the CRC-32 of a row's bytes."""
    return zlib.crc32(row_PD.contiguous().view(torch.uint8).numpy())


def write(folder: Path, images: Sequence[str], rows_NPD: Tensor) -> Path:
    """Write a shard atomically, flushed to the disk, and return its path.

    `images` are the SHA-256 hashes of the rows' images. Raises UserError if the file cannot be written.
    """
    path = folder / shard_name(images)
    # One metadata entry only: safetensors writes several in arbitrary order, and equal shards must be equal files.
    entries = (f"{image}:{checksum(row):08x}" for image, row in zip(images, rows_NPD, strict=True))
    metadata = {"rows": " ".join(entries)}
    try:
        with replacing(path) as temporary:
            save_file({_TENSOR: rows_NPD}, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{path} cannot be written ({error}): free some space, or set BLIPFIT_CACHE to a folder on another disk; "
            "the features stored so far are kept"
        ) from None
    return path


def read(path: Path, shape_PD: tuple[int, int], dtype: torch.dtype) -> Shard:
    """Open a shard, memory-mapped; no row is read yet.

    Raises DamagedShard if the file is truncated or has another shape or dtype than `shape_PD` and `dtype`, and
    FileNotFoundError if it does not exist.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            rows_NPD = file.get_tensor(_TENSOR)
        entries = [entry.split(":") for entry in metadata["rows"].split()]
        images, checksums = [image for image, _ in entries], [int(digits, 16) for _, digits in entries]
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise DamagedShard(path, " ".join(str(error).split())) from None
    if shard_name(images) != path.name:
        raise DamagedShard(path, "its list of images does not match its file name")
    expected_shape = (len(images), *shape_PD)
    if tuple(rows_NPD.shape) != expected_shape or rows_NPD.dtype != dtype:
        actual = f"{tuple(rows_NPD.shape)} {rows_NPD.dtype}"
        raise DamagedShard(path, f"it contains {actual}, expected {expected_shape} {dtype}")
    return Shard(path, images, checksums, rows_NPD, set(range(len(images))))
