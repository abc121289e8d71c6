"""One writer per folder, also on a file system that several hosts share.

The owner of a folder is a file, `.owner/NUMBER.json`: host, process, start, and a random token. The owner changes
`.owner/TOKEN.beat` every few seconds. Whoever waits compares that content by its own monotonic clock, so that wrong
clocks do not matter: if it has not changed for `LEASE_SECONDS`, the owner is gone. The next number, made exclusively,
takes the folder over; the old owner's file and its temporary folders are deleted. An owner that was only stopped cannot
write after that: it checks its token after it has created a temporary folder and before it renames the content into
place, and the rename fails if the temporary folder was deleted in between.

A lock of the file system (`filelock`) keeps processes of one host apart as well.
"""

import contextlib
import json
import os
import platform
import secrets
import shutil
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import filelock

from blipfit.errors import UserError

HEARTBEAT_SECONDS = 5.0
"""Time from one sign of life of an owner to the next."""
LEASE_SECONDS = 60.0
"""Time without a sign of life after which a folder is taken over."""
OWNER_FOLDER = ".owner"


class FolderLost(UserError):
    """Another process has taken over a folder that this process was writing to."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The process that may write into a folder."""

    host: str
    pid: int
    since: str
    """Start of the ownership, by the owner's clock."""
    token: str
    machine: str = ""
    """Identifies the running kernel: the boot id on Linux."""
    namespace: str = ""
    """Identifies the processes that see each other's process ids; empty where that is not known."""
    process_start: str = ""
    """Distinguishes processes that had the same id one after the other."""

    @property
    def is_provably_gone(self) -> bool:
        """Whether the process has ended; True only if it ran beside this one, where its id can be looked up."""
        if not self.namespace or (self.machine, self.namespace) != (_machine(), _namespace()):
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # a process of another user, which may be hidden from this one
            return False
        return _process_start(self.pid) != self.process_start


@dataclass(slots=True)
class _Claim:
    """A folder that this process owns."""

    folder: Path
    number: int
    owner: Owner
    lock: filelock.BaseFileLock | None
    beats: int = 0

    @property
    def file(self) -> Path:
        return _owner_file(self.folder, self.number)

    def is_valid(self) -> bool:
        """Whether the owner's file still holds this token."""
        owner = _read_owner(self.file)
        return owner is not None and owner.token == self.owner.token

    def renew(self) -> None:
        """Give a sign of life, unless the folder is lost."""
        if self.is_valid():
            self.beats += 1
            with contextlib.suppress(OSError):  # the next one may succeed; waiters are patient
                _beat_file(self.folder, self.owner).write_text(str(self.beats))

    def release(self) -> None:
        """Leave the folder to others, without a trace."""
        _claims.remove(self)
        folder = self.file.parent
        if self.is_valid():
            _remove_others(self.file)
            self.file.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # somebody else's claim is in it
                folder.rmdir()
        if self.lock is not None:
            Path(self.lock.lock_file).unlink(missing_ok=True)
            self.lock.release()


_claims: list[_Claim] = []
"""What this process owns; every write asks for it (`require`)."""


def require(path: Path) -> None:
    """Raise FolderLost if `path` is inside a folder that this process owned, and that another process has taken over.

    A path that this process never owned passes.
    """
    location = path.absolute()
    for claim in _claims:
        if location.is_relative_to(claim.folder) and not claim.is_valid():
            owner = read_owner(claim.folder)
            successor = f" to process {owner.pid} on {owner.host}" if owner is not None else ""
            raise FolderLost(
                f"{claim.folder} was lost{successor}: this process had given no sign of life for "
                f"{LEASE_SECONDS:.0f} seconds; it writes nothing more, and the same command again continues or waits"
            )


@contextmanager
def fenced(path: Path) -> Iterator[None]:
    """Turn any error of a write to `path` into FolderLost if the folder was lost meanwhile."""
    try:
        yield
    except Exception:
        require(path)
        raise


@contextmanager
def owning(folders: Sequence[Path], clean: Callable[[Path], None]) -> Iterator[None]:
    """Own all folders, which must exist; a folder whose owner is gone is taken over, after a lease if need be.

    `clean(folder)` removes what an earlier owner was writing; it is called before a folder is used. Raises UserError
    if another process is writing to one of them.
    """
    claims: list[_Claim] = []
    pending = {folder.absolute(): _Watch(folder.absolute()) for folder in folders}
    ended = threading.Event()
    thread = threading.Thread(target=_give_signs_of_life, args=(claims, ended), name="folder-lock", daemon=True)
    thread.start()
    try:
        while pending:
            for folder, watch in list(pending.items()):
                claim = watch.try_claim()
                if claim is not None:
                    _claims.append(claim)
                    claims.append(claim)
                    clean(folder)
                    del pending[folder]
            if pending:
                time.sleep(min(0.2, LEASE_SECONDS / 20))
        yield
    finally:
        ended.set()
        thread.join()
        for claim in claims:
            claim.release()
        for watch in pending.values():
            if watch.lock is not None:
                Path(watch.lock.lock_file).unlink(missing_ok=True)
                watch.lock.release()


def read_owner(folder: Path) -> Owner | None:
    """The owner that a folder's files name, whether it lives or not."""
    latest = _latest(folder)
    return None if latest is None else _read_owner(_owner_file(folder, latest))


def read_sign_of_life(folder: Path) -> str | None:
    """What the owner changes every few seconds; None if there is no owner."""
    owner = read_owner(folder)
    if owner is None:
        return None
    try:
        return f"{owner.token} {_beat_file(folder, owner).read_text()}"
    except OSError:  # it has not given one yet
        return owner.token


def remove_traces(folder: Path) -> None:
    """Delete what an owner that was killed has left in a folder that needs no owner any more."""
    if not any(claim.folder == folder.absolute() for claim in _claims):
        shutil.rmtree(folder / OWNER_FOLDER, ignore_errors=True)


def _give_signs_of_life(claims: Sequence[_Claim], ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        for claim in list(claims):
            claim.renew()


@dataclass(slots=True)
class _Watch:
    """What a waiter has seen of a folder's owner."""

    folder: Path
    sign: str | None = None
    since: float = field(default_factory=time.monotonic)
    lock: filelock.BaseFileLock | None = None

    def try_claim(self) -> _Claim | None:
        """Claim the folder if it has no owner, or if its owner is gone; None if that is not known yet.

        Raises UserError if the owner gives a sign of life.
        """
        is_locked = self._lock()
        latest = _latest(self.folder)
        if latest is None:
            if is_locked:  # by a process that has not named itself yet, or by an older blipfit
                raise self._busy(None)
            return self._claim(None)
        owner, sign = read_owner(self.folder), read_sign_of_life(self.folder)
        if owner is not None and any(owner.token == claim.owner.token for claim in _claims):
            raise self._busy(owner)
        if owner is not None and (owner.is_provably_gone or (not is_locked and _is_local(owner))):
            return self._claim(latest)
        if self.sign is None:
            self.sign, self.since = sign or "", time.monotonic()
        elif sign is not None and sign != self.sign:
            raise self._busy(owner)
        return self._claim(latest) if time.monotonic() - self.since > LEASE_SECONDS else None

    def _lock(self) -> bool:
        """Take the file system's lock if it is free; whether another process holds it."""
        if self.lock is None:
            lock = filelock.FileLock(self.folder / ".lock", timeout=0)
            try:
                lock.acquire()
            except filelock.Timeout:
                return True
            except (OSError, NotImplementedError):  # a file system without locks
                return False
            self.lock = lock
        return False

    def _claim(self, previous: int | None) -> _Claim | None:
        """Create the next owner file; None if another process did, or if the previous owner has left meanwhile."""
        number = (previous or 0) + 1
        file = _owner_file(self.folder, number)
        file.parent.mkdir(exist_ok=True)
        owner = _describe_this_process()
        if not _create(file, owner):
            return None
        expected = {number} if previous is None else {previous, number}
        if set(_numbers(self.folder)) != expected:
            file.unlink(missing_ok=True)
            return None
        _remove_others(file)
        return _Claim(self.folder, number, owner, self.lock)

    def _busy(self, owner: Owner | None) -> UserError:
        process = "" if owner is None else f" (process {owner.pid} on {owner.host})"
        return UserError(
            f"another process is training in {self.folder}{process}; wait for it, or choose another --results folder"
        )


def _create(file: Path, owner: Owner) -> bool:
    """Create an owner file with its content in one step; False if it exists."""
    temporary = file.with_name(f"{owner.token}.tmp")
    text = json.dumps(asdict(owner))
    try:
        temporary.write_text(text, encoding="utf-8")
        try:
            os.link(temporary, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as stream:
                stream.write(text)
        temporary.unlink(missing_ok=True)
    except FileNotFoundError:  # the previous owner has removed the folder
        return False
    except OSError:  # the disk is full
        for path in (temporary, file):
            path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            file.parent.rmdir()
        raise
    created = _read_owner(file)
    return created is not None and created.token == owner.token


def _remove_others(file: Path) -> None:
    """Delete everything beside an owner file: older owners, their signs of life, what killed processes left."""
    with contextlib.suppress(OSError):
        for path in file.parent.iterdir():
            if path != file:
                path.unlink(missing_ok=True)


def _numbers(folder: Path) -> list[int]:
    return sorted(int(path.stem) for path in (folder / OWNER_FOLDER).glob("*.json") if path.stem.isdecimal())


def _latest(folder: Path) -> int | None:
    return max(_numbers(folder), default=None)


def _owner_file(folder: Path, number: int) -> Path:
    return folder / OWNER_FOLDER / f"{number:06d}.json"


def _beat_file(folder: Path, owner: Owner) -> Path:
    return folder / OWNER_FOLDER / f"{owner.token}.beat"


def _read_owner(file: Path) -> Owner | None:
    """The content of an owner file; None if it is missing, damaged or not written yet."""
    try:
        return Owner(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _describe_this_process() -> Owner:
    return Owner(
        host=platform.node(),
        pid=os.getpid(),
        since=datetime.now(UTC).isoformat(timespec="seconds"),
        token=secrets.token_hex(8),
        machine=_machine(),
        namespace=_namespace(),
        process_start=_process_start(os.getpid()),
    )


def _is_local(owner: Owner) -> bool:
    """Whether a free lock proves that the owner is gone: on systems without process namespaces, on this machine."""
    return sys.platform != "linux" and owner.machine == _machine()


@cache
def _machine() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # no Linux
        return f"{platform.node()} {uuid.getnode()}"


def _namespace() -> str:
    """The namespace of this process's ids; empty where /proc does not show this process."""
    try:
        return os.readlink("/proc/self/ns/pid") if os.readlink("/proc/self") == str(os.getpid()) else ""
    except OSError:
        return ""


def _process_start(pid: int) -> str:
    """When a process started, in the kernel's ticks since boot; empty if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return "" if fields[0] == "Z" else fields[19]
