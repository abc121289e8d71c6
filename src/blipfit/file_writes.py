"""Files and folders that are complete or absent: written beside their place, flushed to the disk, renamed.

A temporary folder is named `.NAME.HOST-PID-RANDOM` after what it will become and after the process that writes it, so
that the next command can tell what a killed process left from what a living one is writing.
"""

import errno
import hashlib
import os
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from blipfit import disk_space, folder_lock
from blipfit.errors import UserError

LEFTOVER_SECONDS = 24 * 3600.0
"""Age from which a temporary folder of another machine belongs to a process that was killed."""
FLUSH_THREADS = 8
_NO_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EROFS)
"""What file systems answer that cannot flush a folder."""
_UMASK = os.umask(0o077)
os.umask(_UMASK)  # the system has no call that only reads it
_OWNER = re.compile(r"\.(?P<name>.+)\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[a-z0-9_]{8}")
_UNNAMED = re.compile(r"\..+\.[a-z0-9_]{8}")
"""The temporary folders of earlier versions of blipfit."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Works for files and for folders: create either at the yielded path. The content is on the disk before it gets its
    name, and the name before the block ends, so that a power failure leaves the old or the new content. Raises
    UserError if the disk is full; `path` is then what it was. Raises FolderLost if this process owned the folder, and
    another process has taken it over.
    """
    folder_lock.require(path)
    with explaining_full_disk(path), folder_lock.fenced(path), temporary_folder(path) as folder:
        temporary = folder / path.name
        yield temporary
        _grant_usual_access(temporary)
        flush(temporary)
        folder_lock.require(path)  # if it is taken over later than now, the temporary folder is deleted
        previous = folder / "previous" if temporary.is_dir() and path.exists() else None
        if previous is not None:
            os.replace(path, previous)  # a folder cannot be renamed over a full one
        try:
            os.replace(temporary, path)
        except OSError:
            if previous is not None:
                os.replace(previous, path)
            raise
        flush_entry(path.parent)


@contextmanager
def temporary_folder(target: Path) -> Iterator[Path]:
    """Yield a new empty folder beside `target`, which is created if necessary; it is deleted at the end.

    What killed processes left of earlier attempts at the same target is deleted first.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target.parent, target.name)
    prefix = f".{target.name}.{_host()}-{os.getpid()}-"
    folder = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def explaining_full_disk(path: Path) -> Iterator[None]:
    """Turn any exception that says that the disk is full into a UserError that names `path`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        disk_space.refuse_full_disk(error, path)
        raise


def remove_leftovers(folder: Path, name: str | None = None, seconds: float = LEFTOVER_SECONDS) -> None:
    """Delete the temporary folders in `folder` that killed processes left.

    `name`: only those of this file or folder; by default all, which is right for folders that are blipfit's own.
    `seconds`: age of the last write from which a folder of another machine is left over. Folders of a process that
    lives on this machine stay.
    """
    if not folder.is_dir():
        return
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)]
    for entry_name in names:
        if _is_leftover(folder / entry_name, name, seconds):
            shutil.rmtree(folder / entry_name, ignore_errors=True)


def remove_temporary_folders(folder: Path) -> None:
    """Delete the temporary folders of all processes in a folder that this process alone may write to."""
    for path in folder.glob(".*"):
        if _OWNER.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def _is_leftover(folder: Path, name: str | None, seconds: float) -> bool:
    owner = _OWNER.fullmatch(folder.name)
    if name is not None and (owner is None or owner["name"] != name):
        return False  # a hidden folder of the user
    if owner is None and not _UNNAMED.fullmatch(folder.name):
        return False
    if owner is not None and owner["host"] == _host():
        return not _is_alive(int(owner["pid"]))
    return time.time() - _last_write(folder) > seconds


@cache
def _host() -> str:
    """Eight digits for the processes that can see each other's process ids: this machine, or this container."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        namespace = ""
    return hashlib.sha256(f"{platform.node()} {namespace}".encode()).hexdigest()[:8]


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # a process of another user
        return True
    return True


def _last_write(folder: Path) -> float:
    """Time of the newest change in a folder; now, if it disappears meanwhile."""
    try:
        # Creating a file changes its folder's time. Files that were linked have the older time of their source.
        return max(path.lstat().st_mtime for path in (folder, *folder.rglob("*")))
    except OSError:
        return time.time()


def _grant_usual_access(path: Path) -> None:
    """Give weight files the access rights of other new files; safetensors lets only the owner read what it writes."""
    for file in path.rglob("*.safetensors") if path.is_dir() else [path]:
        if file.suffix == ".safetensors" and not file.is_symlink():
            file.chmod(0o666 & ~_UMASK)


def flush(path: Path) -> None:
    """Write a file, or a folder with all that is in it, from the system's memory to the disk.

    A file system does many at once in hardly more time than one, so threads flush them.
    """
    paths = [path, *(entry for entry in path.rglob("*") if not entry.is_symlink())] if path.is_dir() else [path]
    with ThreadPoolExecutor(FLUSH_THREADS if len(paths) > FLUSH_THREADS else 1) as pool:
        for _ in pool.map(flush_entry, paths):
            pass


def flush_entry(path: Path) -> None:
    """Flush one file, or the list of names of one folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)
