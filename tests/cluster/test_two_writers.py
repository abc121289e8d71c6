"""Two processes in two process namespaces train in one results folder, as on two hosts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster import command_line

SCRIPT = Path(__file__).with_name("command_with_clock.py")
NAMESPACE = ["unshare", "--pid", "--fork", "--mount-proc", "--uts", "--kill-child"]
LEASE = 10
pytestmark = pytest.mark.slow


def start(clock_error: int, command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """The command of a sweep in its own namespace, with a clock that is wrong."""
    arguments = [*NAMESPACE, sys.executable, str(SCRIPT), str(clock_error), str(LEASE), *command[3:]]
    with log.open("w") as file:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)


def send(process: subprocess.Popen[bytes], number: int) -> None:
    """Signal the Python process, the only child of `unshare`."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), number)


def test_a_stopped_trainer_loses_to_one_with_a_wrong_clock(tmp_path: Path) -> None:
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode:
        pytest.skip("no process namespaces: unshare is refused here")
    data = command_line.draw(tmp_path / "data")
    here, there = tmp_path / "here", tmp_path / "there"
    command_line.run(command_line.sweep(data, here), {})
    command = command_line.sweep(data, there)
    first = start(0, command, tmp_path / "first.log")
    try:
        deadline = time.monotonic() + 300
        while not list(there.glob("icons/13/checkpoint/state-*.safetensors")):
            assert time.monotonic() < deadline, (tmp_path / "first.log").read_text()
            time.sleep(0.05)
        send(first, signal.SIGSTOP)
        second = start(600, command, tmp_path / "second.log")
        assert second.wait(timeout=900) == 0, (tmp_path / "second.log").read_text()
        finished = command_line.contents(there)
        del finished["icons/13/.lock"]  # the stopped process still holds it
        send(first, signal.SIGCONT)
        assert first.wait(timeout=300) == 2, (tmp_path / "first.log").read_text()
    finally:
        if first.poll() is None:
            first.kill()
            first.wait()
    assert "was lost" in (tmp_path / "first.log").read_text()
    assert command_line.contents(there) == finished == command_line.contents(here)
