"""A sweep on a Ray cluster of this machine: a worker is killed in mid-bank, the head is lost and started again."""

import contextlib
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster import command_line

pytestmark = pytest.mark.slow
WORKERS = 3
ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_DISABLE_IMPORT_WARNING": "1", "OMP_NUM_THREADS": "1"}
ENVIRONMENT |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(24)}
"""The cluster is this test's own, and so is its token."""


class RayCluster:
    """A head without CPUs, and three nodes with one each; every process of it is started by this object."""

    def __init__(self, folder: Path):
        pytest.importorskip("ray")
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self.port = listener.getsockname()[1]
        self.folder, self.processes = folder, list[subprocess.Popen]()
        self.address = f"127.0.0.1:{self.port}"

    def start(self) -> None:
        head = ["--head", "--port", str(self.port), "--num-cpus", "0", "--include-dashboard", "false"]
        self._start([*head, "--temp-dir", str(self.folder), "--object-store-memory", "100000000"])
        for _ in range(WORKERS):
            self._start(["--address", self.address, "--num-cpus", "1", "--object-store-memory", "80000000"])

    def _start(self, arguments: list[str]) -> None:
        log = self.folder / f"node-{len(self.processes)}-{time.monotonic_ns()}.log"
        ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--node-ip-address", "127.0.0.1"]
        with log.open("w") as file:
            process = subprocess.Popen(
                [*ray, *arguments],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )
        self.processes.append(process)
        wait_for(lambda: "runtime started" in log.read_text() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()

    def stop(self) -> None:
        """End everything at once, as a power failure does."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self.processes.clear()


def wait_for(condition: Callable[[], bool], seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.fixture
def cluster() -> Iterator[RayCluster]:
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        own_cluster = RayCluster(Path(folder))
        try:
            own_cluster.start()
            yield own_cluster
        finally:
            own_cluster.stop()


def attempts(results: Path) -> list[dict]:
    return [json.loads(file.read_text()) for file in sorted(results.glob(".sweep/*/units/*.attempt.json"))]


def test_a_killed_worker_and_a_lost_head(cluster: RayCluster, tmp_path: Path) -> None:
    data = command_line.draw(tmp_path / "data")
    here, there = tmp_path / "here", tmp_path / "there"
    command_line.run(command_line.sweep(data, here), ENVIRONMENT)
    sweep = command_line.sweep(data, there, "--engine", "ray", "--address", cluster.address, "--json")
    environment = {**os.environ, **ENVIRONMENT}
    with (tmp_path / "driver.log").open("w") as log:
        driver = subprocess.Popen(sweep, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    try:
        wait_for(lambda: len(list(there.glob("icons/*/checkpoint/state-*.safetensors"))) >= 3)
        killed = attempts(there)[0]
        os.kill(killed["pid"], signal.SIGKILL)
        wait_for(lambda: attempts(there)[0]["pid"] != killed["pid"])  # Ray has started another one for the unit
        cluster.stop()
        driver.wait(timeout=300)
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
    assert len(list(there.glob("icons/*/result.json"))) < 4
    cluster.start()
    record = json.loads(command_line.run(sweep, ENVIRONMENT))
    assert record["failed"] == record["unit_failures"] == {}
    assert command_line.contents(there) == command_line.contents(here)


def test_a_local_ray(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    data, results = command_line.draw(tmp_path / "data", 16), tmp_path / "results"
    command = [*command_line.sweep(data, results, "--engine", "ray", "--json"), "--cpus-per-unit", "1"]
    record = json.loads(command_line.run(command, ENVIRONMENT))
    assert len(record["results"]) == 4
    assert not record["failed"]
