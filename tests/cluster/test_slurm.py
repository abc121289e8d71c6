"""A sweep as a job array on a Slurm cluster of this machine: tasks are killed, preempted, near their limit."""

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import command_line

SCRIPT = Path(__file__).with_name("start_slurm.sh")
pytestmark = pytest.mark.slow


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    pytest.importorskip("submitit")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:  # a short path: sockets have one
        started = subprocess.run(["bash", str(SCRIPT), "start", f"{folder}/c"], capture_output=True, text=True)
        if started.returncode == 77:
            pytest.skip(started.stderr.strip())
        assert started.returncode == 0, started.stderr
        try:
            yield {"SLURM_CONF": started.stdout.splitlines()[-1]}
        finally:
            subprocess.run(["bash", str(SCRIPT), "stop", f"{folder}/c"], check=True)


def wait_for(condition: Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def has_checkpoint(results: Path, experiment: int) -> bool:
    return any((results / f"icons/{experiment}/checkpoint").glob("state-*.safetensors"))


def attempts(results: Path) -> dict[int, dict]:
    """The latest attempt of each unit that has been started."""
    files = results.glob(".sweep/*/units/*.attempt.json")
    return {int(file.name[:4]): json.loads(file.read_text()) for file in files}


def test_killed_preempted_and_signaled_tasks(environment: dict[str, str], tmp_path: Path) -> None:
    data = command_line.draw(tmp_path / "data")
    here, there = tmp_path / "here", tmp_path / "there"
    command_line.run(command_line.sweep(data, here), environment)
    engine = ("--engine", "slurm", "--array-parallelism", "2", "--time", "30")

    def status() -> list[dict]:
        return json.loads(command_line.run(command_line.sweep(data, there, "--status", "--json"), environment))["units"]

    submitted = json.loads(command_line.run(command_line.sweep(data, there, *engine, "--json"), environment))
    assert (submitted["submitted"], submitted["units"]) == (4, 4)
    wait_for(lambda: has_checkpoint(there, 13) and has_checkpoint(there, 14))
    os.kill(attempts(there)[0]["pid"], 9)
    subprocess.run(["scontrol", "requeue", f"{submitted['job']}_1"], env={**os.environ, **environment}, check=True)
    wait_for(lambda: has_checkpoint(there, 15) or has_checkpoint(there, 16))
    unit = 2 if has_checkpoint(there, 15) else 3
    signaled = attempts(there)[unit]
    # What Slurm sends before the time limit.
    near_limit = ["scancel", "--signal=USR1", f"{submitted['job']}_{unit}"]
    subprocess.run(near_limit, env={**os.environ, **environment}, check=True)
    wait_for(lambda: attempts(there)[unit]["pid"] != signaled["pid"])

    def has_ended() -> bool:
        queue = ["squeue", "--noheader", "--array", "--format=%T"]
        return not subprocess.run(queue, env={**os.environ, **environment}, capture_output=True, text=True).stdout

    wait_for(has_ended, 900)
    states = {unit["unit"]: unit["state"] for unit in status()}
    assert states == {0: "failed", 1: "finished", 2: "finished", 3: "finished"}
    assert {attempts(there)[number]["reason"] for number in (1, 2, 3)} == {None}
    again = json.loads(command_line.run(command_line.sweep(data, there, *engine, "--wait", "--json"), environment))
    assert again["submitted"] == 1
    assert {unit["state"] for unit in again["status"]} == {"finished"}
    assert command_line.contents(there) == command_line.contents(here)
