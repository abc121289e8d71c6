"""Hashes that identify images by their content."""

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from blipfit.data import images
from blipfit.data.question import Question


def digest_images(questions: Sequence[Question]) -> str:
    """Return a SHA-256 over the id of every question and the content of its image, in order.

    Threads hash the files; within a process a file is read once, also for the feature store. Raises UserError if a
    file is missing or unreadable.
    """
    unique = list(dict.fromkeys((question.image, question.transparency) for question in questions))
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        hashes = dict(zip(unique, pool.map(lambda entry: hash_image(*entry), unique), strict=True))
    lines = (f"{question.id!r} {hashes[question.image, question.transparency]}\n" for question in questions)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of an image file's bytes.

    Within a process, a file is read again only if its size, modification time or inode changed. Raises UserError if
    the file is missing or unreadable.
    """
    return hash_image(path, "dropped")


def hash_image(path: Path, transparency: images.Transparency) -> str:
    """Return the hash under which an image's features are stored: `hash_file`, another for transparency on white.

    Images without transparency have one hash. Raises UserError as `hash_file` does.
    """
    try:
        stat = path.stat()
    except OSError:
        images.read_image(path)  # raises UserError with the reason and the fix
        raise
    return _hash_version(path, transparency, stat.st_size, stat.st_mtime_ns, stat.st_ino)


@cache
def _hash_version(path: Path, transparency: images.Transparency, size: int, modified: int, inode: int) -> str:
    """Hash a file; size, time and inode are arguments only to be part of the cache key."""
    with images.large_file_lock(path):
        data = images.read_image(path)
    file_hash = hashlib.sha256(data).hexdigest()
    return hash_on_white(file_hash) if transparency == "white" and images.is_transparent(data) else file_hash


def hash_on_white(file_hash: str) -> str:
    """Return the image hash of a file with transparency on white, from the hash of its bytes."""
    return hashlib.sha256(f"{file_hash} on white".encode()).hexdigest()
