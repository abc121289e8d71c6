"""Signals: SIGINT, SIGTERM and SIGUSR1 stop a command, and training and evaluation save first.

Only the command line installs the handlers (`install`); a program that uses blipfit as a library keeps its own.

A signal raises `Interrupted` at once, except inside `deferred()`: there the code finishes its step or batch, asks
`is_requested()`, saves, and calls `stop()`. A second signal ends the process without waiting for anything.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from blipfit.errors import Interrupted

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1
"""SLURM sends SIGUSR1 before the time limit with `--signal=USR1@120`, and SIGTERM when a job is canceled."""


class _State:
    """What the handler and the code that it interrupts share; a process has one set of signals."""

    requested: int | None = None
    """The first signal that arrived."""
    deferred = 0
    """Number of `deferred()` blocks that are open."""


def install() -> None:
    """Handle the signals in this process. A signal that the parent process ignores (`nohup`, `&`) stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _handle)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.requested is not None:
        os.write(2, b"blipfit: stopped at once; the same command again continues from what is saved\n")
        os._exit(Interrupted(number).exit_code)
    _State.requested = number
    if not _State.deferred:
        raise Interrupted(number)


@contextmanager
def deferred() -> Iterator[None]:
    """In this block a signal waits for the code to ask for it; the latest time is the end of the block."""
    _State.deferred += 1
    try:
        yield
    finally:
        _State.deferred -= 1
    if not _State.deferred and _State.requested is not None:
        stop()


def is_requested() -> bool:
    """Whether a signal has arrived in this process, so that the work should be saved and stopped."""
    return _State.requested is not None


def stop() -> None:
    """Raise Interrupted for the signal that arrived; SIGTERM if it arrived in another process of the same training."""
    number = _State.requested if _State.requested is not None else signal.SIGTERM
    raise Interrupted(number, is_saved=True)
