"""One command in several processes ends as one command: one message, one exit code, no worker left."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from blipfit.errors import UserError
from blipfit.runtime import launcher

PARENT = """
import sys
from blipfit.runtime import interruption, launcher
interruption.install()
sys.exit(launcher.run_workers(2, ["-c", {worker!r}]))
"""
WORKER = """
import os, signal, sys, time
from pathlib import Path
from blipfit.errors import Interrupted
from blipfit.runtime import interruption, launcher
interruption.install()
launcher.watch_parent()
rank = int(os.environ["RANK"])
def end(message, code):
    launcher.write_message(message)
    sys.exit(code)
def wait(seconds=60):
    Path(f"ready-{rank}").write_text(str(os.getpid()))
    try:
        time.sleep(seconds)
    except Interrupted as error:
        end(f"saved by {rank}\\n", error.exit_code)
"""


@pytest.fixture
def start(tmp_path: Path):
    """Start two workers that run this code (`rank`, `end`, `wait`) below a parent."""

    def run(code: str) -> subprocess.Popen[str]:
        worker = WORKER + textwrap.dedent(code)
        arguments = [sys.executable, "-c", PARENT.format(worker=worker)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(arguments, cwd=tmp_path, **pipes)

    return run


def _pids(folder: Path) -> list[int]:
    """The ids of both workers, once they wait."""
    files = [folder / f"ready-{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 60
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return [int(file.read_text()) for file in files]


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_main_worker_prints_and_the_others_do_not(start):
    stdout, stderr = (parent := start("print(rank); print(rank, file=sys.stderr)")).communicate(timeout=60)
    assert (parent.returncode, stdout, stderr) == (0, "0\n", "0\n")


def test_a_message_of_all_workers_is_printed_once(start):
    stdout, stderr = (parent := start("end('blipfit: a sentence\\n', 2)")).communicate(timeout=60)
    assert (parent.returncode, stdout, stderr) == (2, "", "blipfit: a sentence\n")


def test_the_worker_that_failed_first_explains_the_end(start):
    """The other fails because it has lost the first, as a process does that waits for a peer in gloo."""
    code = "end('cause\\n', 1) if rank else (time.sleep(0.5), end('peer is gone\\n', 1))"
    _, stderr = (parent := start(code)).communicate(timeout=60)
    assert (parent.returncode, stderr) == (1, "cause\n")


def test_a_mistake_of_the_user_explains_more_than_a_lost_peer(start):
    code = "(time.sleep(0.5), end('no memory\\n', 2)) if rank else end('peer is gone\\n', 1)"
    _, stderr = (parent := start(code)).communicate(timeout=60)
    assert (parent.returncode, stderr) == (2, "no memory\n")


def test_an_exit_code_without_message_ends_nothing(start):
    """`train` exits with 1 if an experiment failed: the main worker still prints the results."""
    stdout, stderr = (parent := start("rank or (time.sleep(3), print('results')); sys.exit(1)")).communicate(timeout=60)
    assert (parent.returncode, stdout, stderr) == (1, "results\n", "")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_worker_ends_the_command(start, tmp_path, victim):
    parent = start("wait()")
    pids = _pids(tmp_path)
    os.kill(pids[victim], signal.SIGKILL)
    _, stderr = parent.communicate(timeout=60)
    assert parent.returncode == 128 + signal.SIGKILL
    assert f"process {victim + 1} of 2 was killed by SIGKILL" in stderr
    assert "the same command again continues" in stderr
    assert stderr.count("\n") == 1
    assert not any(map(_is_running, pids))


def test_a_signal_lets_the_workers_save(start, tmp_path):
    parent = start("wait()")
    pids = _pids(tmp_path)
    parent.terminate()
    _, stderr = parent.communicate(timeout=60)
    assert (parent.returncode, stderr) == (143, "saved by 0\n")
    assert not any(map(_is_running, pids))


def test_workers_do_not_outlive_their_parent(start, tmp_path):
    parent = start("wait()")
    pids = _pids(tmp_path)
    parent.kill()
    parent.communicate(timeout=60)
    deadline = time.monotonic() + 60
    while any(map(_is_running, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_worker_runs_the_command_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    launcher.launch(None)
    launcher.launch(2)
    with pytest.raises(UserError, match="the launcher has started 2"):
        launcher.launch(3)


def test_a_single_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    launcher.launch(None)
    launcher.launch(1)
    assert not launcher.write_message("nobody waits for this")
