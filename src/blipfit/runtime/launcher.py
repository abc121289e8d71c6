"""Run this command in several processes of this machine, one GPU each (`--processes N`), and end as one command.

The workers find each other through the variables that torchrun and `accelerate launch` set, so a command runs the same
way under any of the three. The main worker prints; the messages of all workers come back through files, and the parent
prints the one that explains the end. This module needs no torch.
"""

import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blipfit.errors import Interrupted, UserError

_MESSAGE_FILE = "BLIPFIT_MESSAGE_FILE"
"""Environment variable of a worker: the file for the message that it ends with."""
_POLL_SECONDS = 0.05
_GRACE_SECONDS = 2.0
"""Time that the other workers have to end by themselves after one has failed."""
_SAVE_SECONDS = 300.0
"""The same after one was interrupted by a signal."""
_INTERRUPTED = (130, 143)
"""Exit codes of `Interrupted`."""


@dataclass
class Worker:
    """A process of the command."""

    rank: int
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def code(self) -> int | None:
        """Its exit code, negative for a signal that killed it; None while it runs."""
        return self.process.poll()

    @property
    def message(self) -> str:
        """What it ended with: a sentence or a traceback; empty if it had nothing to say."""
        file = self.folder / _message_name(self.rank)
        return file.read_text(encoding="utf-8") if file.exists() else ""

    @property
    def last_lines(self) -> str:
        """The end of its standard error; the main worker's goes to the terminal."""
        file = self.folder / _stderr_name(self.rank)
        return file.read_text(encoding="utf-8", errors="replace")[-2000:] if file.exists() else ""

    @property
    def grace_seconds(self) -> float:
        """How long the others may go on after this worker has ended."""
        if self.code in _INTERRUPTED:
            return _SAVE_SECONDS  # the main worker may still write the checkpoint
        return _GRACE_SECONDS if self.code and (self.code < 0 or self.message) else math.inf

    @property
    def cause(self) -> int:
        """How well this worker's end explains that of the command; 0 explains it best."""
        code = self.code or 0
        if code < 0:
            return 0  # the others fail because they have lost this one
        if code == 2:
            return 1  # a mistake of the user
        return 3 if code in _INTERRUPTED or not self.message else 2


def process_count() -> int:
    """The number of processes that a launcher started for this command; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launch(processes: int | None) -> None:
    """Run this command in so many processes and exit as they do; returns at once in a worker, or if it is a single one.

    Raises UserError if a launcher has started another number of processes.
    """
    if "WORLD_SIZE" in os.environ:
        if processes not in (None, process_count()):
            raise UserError(f"--processes {processes}: the launcher has started {process_count()}; omit --processes")
    elif processes is not None and processes > 1:
        sys.exit(run_workers(processes, ["-m", "blipfit", *sys.argv[1:]]))


def run_workers(count: int, arguments: Sequence[str]) -> int:
    """Run Python with these arguments in `count` workers; returns the exit code of the command.

    If a worker fails or is killed, the others are stopped. A signal is passed on to the workers, which save and stop.
    """
    with tempfile.TemporaryDirectory(prefix="blipfit-") as folder:
        workers = _start(count, arguments, Path(folder))
        ended: list[Worker] = []
        try:
            _wait(workers, ended)
        except (Interrupted, KeyboardInterrupt) as interruption:
            for worker in workers:
                if worker.code is None:
                    worker.process.send_signal(getattr(interruption, "number", signal.SIGINT))
            _wait(workers, ended)
        finally:
            _stop(workers)
        return _report(ended, count)


def write_message(message: str) -> bool:
    """Hand the message that this process ends with to the parent; False if no parent waits for it."""
    file = os.environ.get(_MESSAGE_FILE)
    if file:
        Path(file).write_text(message, encoding="utf-8")
    return bool(file)


def watch_parent() -> None:
    """Stop this worker, as SIGTERM does, when its parent is gone; does nothing in other processes."""
    if os.environ.get(_MESSAGE_FILE):
        threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    os.read(0, 1)  # the parent holds the other end and never writes: this returns when it is gone
    os.kill(os.getpid(), signal.SIGTERM)


def _start(count: int, arguments: Sequence[str], folder: Path) -> list[Worker]:
    threads = max(1, (os.cpu_count() or 1) // count)
    common = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(_free_port())
    defaults = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}  # a lost peer needs no log of C++
    workers = []
    for rank in range(count):
        ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), _MESSAGE_FILE: str(folder / _message_name(rank))}
        process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**defaults, **os.environ, **common, **ranks},
            stdin=subprocess.PIPE,
            stdout=None if rank == 0 else subprocess.DEVNULL,
            stderr=None if rank == 0 else (folder / _stderr_name(rank)).open("wb"),
            start_new_session=True,  # Ctrl-C reaches the parent alone, which passes it on once
        )
        workers.append(Worker(rank, process, folder))
    return workers


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _wait(workers: Sequence[Worker], ended: list[Worker]) -> None:
    """Wait until all workers have ended, or for a moment after one has failed; `ended` gets them in their order."""
    deadline = math.inf
    while len(ended) < len(workers) and time.monotonic() < deadline:
        for worker in workers:
            if worker not in ended and worker.code is not None:
                ended.append(worker)
                deadline = min(deadline, time.monotonic() + worker.grace_seconds)
        time.sleep(_POLL_SECONDS)


def _stop(workers: Sequence[Worker]) -> None:
    """Stop the workers that are left: they wait for one that is gone."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        left = [worker for worker in workers if worker.code is None]
        for worker in left:
            worker.process.send_signal(number)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(worker.code is None for worker in left) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)


def _report(ended: Sequence[Worker], count: int) -> int:
    """Print what ended the command, and return its exit code; `ended`: the workers that nobody stopped, in order."""
    failed = [worker for worker in ended if worker.code]
    if not failed:
        return 0
    worker = min(failed, key=lambda worker: (worker.cause, worker.rank if worker.code in _INTERRUPTED else 0))
    code = worker.code or 0
    message = worker.message
    if code < 0:
        name = signal.Signals(-code).name
        message = (
            f"{worker.last_lines}blipfit: process {worker.rank + 1} of {count} was killed by {name} (by the system if "
            "memory was short); the same command again continues from what is saved\n"
        )
    if sys.stderr.isatty():
        message = f"\x1b[?25h{message}"  # a killed worker may have left the cursor hidden
    sys.stderr.write(message)
    return 128 - code if code < 0 else code


def _message_name(rank: int) -> str:
    return f"message-{rank}"


def _stderr_name(rank: int) -> str:
    return f"stderr-{rank}"
