"""Who owns a folder: processes of one host and of several, stopped, killed, with wrong clocks."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from blipfit import folder_lock
from blipfit.errors import UserError
from blipfit.run_folder import Run, write_text

SCRIPT = Path(__file__).with_name("folder_owner.py")
NAMESPACE = ("unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child")
BEAT, LEASE = 0.1, 1.2


def _has_namespaces() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0


needs_namespaces = pytest.mark.skipif(not _has_namespaces(), reason="no process namespaces: unshare is refused here")


class OwnerProcess:
    """A process of folder_owner.py."""

    def __init__(self, folder: Path, action: str, text: str, prefix: Sequence[str], clock_error: int):
        command = [*prefix, sys.executable, str(SCRIPT), str(folder), str(BEAT), str(LEASE), action, text]
        command.append(str(clock_error))
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.is_in_namespace = prefix[:1] == NAMESPACE[:1]

    def read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def proceed(self) -> str:
        """Let it write; returns what it prints last."""
        return self.process.communicate("\n", timeout=30)[0].strip()

    def signal(self, number: int) -> None:
        """Send a signal to the Python process; in a namespace it is the first child."""
        pid = self.process.pid
        if self.is_in_namespace:
            pid = int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])
        subprocess.run(["kill", f"-{number}", str(pid)], check=True)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(folder_lock, "HEARTBEAT_SECONDS", BEAT)
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", LEASE)
    return Run(tmp_path / "icons" / "1").create()


@pytest.fixture
def start(run: Run) -> Iterator[Callable[..., OwnerProcess]]:
    processes: list[OwnerProcess] = []

    def start_process(
        action: str = "hold", text: str = "first", prefix: Sequence[str] = (), clock_error: int = 0
    ) -> OwnerProcess:
        processes.append(OwnerProcess(run.folder, action, text, prefix, clock_error))
        return processes[-1]

    yield start_process
    for owner in processes:
        if owner.process.poll() is None:
            owner.signal(signal.SIGKILL)
        owner.process.communicate()


def take_over(run: Run, text: str = "second") -> None:
    with run.lock():
        write_text(run.folder / "text", text)


def test_an_owner_leaves_nothing_behind(run: Run) -> None:
    take_over(run)
    assert [path.name for path in run.folder.iterdir()] == ["text"]


def test_a_killed_process_of_this_host_is_recognized_at_once(run: Run, start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 10_000.0)
    owner = start()
    assert owner.read() == "owns"
    owner.signal(signal.SIGKILL)
    owner.process.communicate()
    take_over(run)
    assert [path.name for path in run.folder.iterdir()] == ["text"]


@needs_namespaces
def test_a_stopped_owner_loses_the_folder(run: Run, start) -> None:
    owner = start(prefix=NAMESPACE)
    assert owner.read() == "owns"
    owner.signal(signal.SIGSTOP)
    take_over(run)
    owner.signal(signal.SIGCONT)
    assert "was lost" in owner.proceed()
    assert (run.folder / "text").read_text() == "second"


@needs_namespaces
def test_a_killed_owner_in_another_namespace_is_given_its_lease(run: Run, start) -> None:
    owner = start(prefix=NAMESPACE)
    assert owner.read() == "owns"
    named = folder_lock.read_owner(run.folder)
    assert named is not None
    assert named.pid < 10, "the number of another process here"
    owner.signal(signal.SIGKILL)
    started = time.monotonic()
    take_over(run)
    assert time.monotonic() - started >= LEASE


@pytest.mark.parametrize("action", ["write", "unchecked"])
def test_a_write_that_was_stopped_is_refused_by_the_rename(run: Run, start, action: str) -> None:
    owner = start(action)
    assert [owner.read(), owner.read()] == ["owns", "writes"]
    owner.signal(signal.SIGSTOP)
    take_over(run)
    owner.signal(signal.SIGCONT)
    expected = "was lost" if action == "write" else "FileNotFoundError"
    assert expected in owner.proceed()
    assert (run.folder / "text").read_text() == "second"


def test_a_wrong_clock_takes_no_folder(run: Run, start) -> None:
    owner = start(clock_error=600)
    assert owner.read() == "owns"
    named = folder_lock.read_owner(run.folder)
    assert named is not None
    assert datetime.fromisoformat(named.since) > datetime.now(UTC) + timedelta(minutes=9)
    with pytest.raises(UserError, match=r"another process is training in .* \(process \d+ on "):
        take_over(run)
    other = start(clock_error=600)
    assert "is training in" in other.read()
    assert owner.proceed() == "left"
    assert (run.folder / "text").read_text() == "first"


def test_one_of_several_waiters_gets_the_folder(run: Run, start) -> None:
    gone = folder_lock.Owner("elsewhere", 1, "2026-01-01T00:00:00+00:00", "0" * 16, "another machine", "pid:[1]", "5")
    folder = run.folder / folder_lock.OWNER_FOLDER
    folder.mkdir()
    (folder / "000007.json").write_text(json.dumps({name: getattr(gone, name) for name in gone.__slots__}))
    waiters = [start(text=str(number)) for number in range(3)]
    lines = [waiter.read() for waiter in waiters]
    owners = [number for number, line in enumerate(lines) if line == "owns"]
    assert len(owners) == 1, lines
    assert sum("is training in" in line for line in lines) == 2
    assert waiters[owners[0]].proceed() == "left"
    assert (run.folder / "text").read_text() == str(owners[0])
    assert [path.name for path in run.folder.iterdir()] == ["text"]


def test_an_owner_file_that_is_damaged_is_given_its_lease(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "LEASE_SECONDS", 0.2)
    (run.folder / folder_lock.OWNER_FOLDER).mkdir()
    (run.folder / folder_lock.OWNER_FOLDER / "000001.json").write_text("{")
    take_over(run)
    assert [path.name for path in run.folder.iterdir()] == ["text"]
