"""Space on disk: what a command will need, whether it is there, and what to say when a disk is full."""

import errno
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from blipfit.errors import UserError

BLOCK_BYTES = 4096
"""File systems give space in blocks; a small file takes one."""

_FULL = tuple(getattr(errno, name) for name in ("ENOSPC", "EDQUOT") if hasattr(errno, name))
# Libraries that write through Rust or C++ raise their own exceptions, which hold the system's error as text.
_FULL_TEXT = re.compile(
    rf"\(os error (?:{'|'.join(map(str, _FULL))})\)|No space left on device|Disk quota exceeded"
    r"|No usable temporary directory found|\[enforce fail at inline_container.*unexpected pos"
)
_CONTINUE = "make room and run the same command again, which continues from what is written"


def is_disk_full(error: BaseException | None) -> bool:
    """Return whether an exception, or one that it was raised from, says that a disk is full or a quota used up."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _FULL:
            return True
        if not isinstance(error, UserError) and _FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def describe_full_disk(error: BaseException, path: Path | None = None) -> str | None:
    """Return a sentence for the user if a write failed because a disk is full, else None.

    `path`: the file or folder that was written, by default what the error names.
    """
    if not is_disk_full(error):
        return None
    if path is None:
        # Of two files of a copy, the second is written.
        names = [getattr(error, name, None) for name in ("filename2", "filename")]
        path = next((Path(os.fsdecode(name)) for name in names if isinstance(name, (str, bytes))), None)
    if path is None:
        return f"a file cannot be written, because the disk is full: {_CONTINUE}"
    left = f"{format_bytes(free_bytes(path))} left in {existing_folder(path)}"
    return f"{path} cannot be written, because the disk has no room for it ({left}): {_CONTINUE}"


def refuse_full_disk(error: BaseException, path: Path | None = None) -> None:
    """Raise UserError if a write failed because a disk is full; `path` as in `describe_full_disk`."""
    if (sentence := describe_full_disk(error, path)) is not None:
        raise UserError(sentence) from error


def existing_folder(path: Path) -> Path:
    """Return the nearest folder above or at `path` that exists."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write in the file system of a path, which need not exist yet."""
    return shutil.disk_usage(existing_folder(path)).free


def is_same_disk(path: Path, other: Path) -> bool:
    """Return whether two paths, which need not exist yet, are on one file system."""
    return existing_folder(path).stat().st_dev == existing_folder(other).stat().st_dev


def file_bytes_on_disk(sizes: Iterable[int]) -> int:
    """Return the space on disk, in bytes, of files of these sizes: every file takes whole blocks."""
    return sum(-(-size // BLOCK_BYTES) * BLOCK_BYTES for size in sizes)


def folder_bytes(folder: Path) -> int:
    """Return the space on disk, in bytes, of all files below a folder; 0 if it does not exist."""
    sizes = []
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size if path.is_file() else 0)
        except OSError:  # removed since it was listed
            continue
    return file_bytes_on_disk(sizes)


def require_space(
    folder: Path, needed: int, contents: str, fix: str = "make room, or choose a folder on another disk"
) -> None:
    """Raise UserError if the file system of `folder` has less than `needed` bytes; `contents`: what will be written."""
    if needed > (free := free_bytes(folder)):
        raise UserError(
            f"{contents} need {format_bytes(needed)}, but {folder} has only {format_bytes(free)} left: {fix}"
        )


def format_bytes(size: int) -> str:
    """Format a number of bytes for people, for example `707 KiB` or `6.9 GiB`."""
    amount, units = float(size), ["bytes", "KiB", "MiB", "GiB", "TiB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    return f"{amount:.0f} {units[0]}" if amount >= 100 or units[0] == "bytes" else f"{amount:.1f} {units[0]}"
