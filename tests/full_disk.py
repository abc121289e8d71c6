"""Disks of a few kilobytes for tests (tmpfs)."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Disk:
    """A file system of its own."""

    folder: Path

    def resize(self, size: int) -> None:
        """Change the size, in bytes; it may be less than what is used."""
        _mount("-o", f"remount,size={size}", str(self.folder))


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Disk]:
    """A disk of `size` bytes at `folder`; the test is skipped where none can be mounted."""
    folder.mkdir(parents=True, exist_ok=True)
    reason = _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    if reason:
        pytest.skip(f"no tmpfs can be mounted here: {reason}")
    try:
        yield Disk(folder)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _mount(*arguments: str) -> str:
    """Mount something; return why it could not be done, or nothing."""
    try:
        done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else ""
