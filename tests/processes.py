"""Run a function in several processes of one machine, connected through gloo, inside a test."""

import multiprocessing
import os
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch

from blipfit.runtime import distributed

SECONDS = 120


def run(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `function(*arguments)` in `count` processes; returns the results in the processes' order.

    The processes are forked, so they need not import anything and the function may be a closure.
    """
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    workers = [
        context.Process(target=_work, args=(rank, count, port, pipes[rank][1], function, arguments))
        for rank in range(count)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        for worker in workers:
            worker.start()
    try:
        outcomes = [receiver.recv() if receiver.poll(SECONDS) else (None, "no answer") for receiver, _ in pipes]
    finally:
        for worker in workers:
            worker.kill()
            worker.join()
    errors = [error for _, error in outcomes if error]
    assert not errors, "\n".join(errors)
    return [result for result, _ in outcomes]


def _work(
    rank: int, count: int, port: int, sender: Any, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    from accelerate import PartialState

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_PORT": str(port)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    PartialState._reset_state()
    distributed.state.cache_clear()
    try:
        sender.send((function(*arguments), None))
        distributed.wait()
    except BaseException:
        sender.send((None, f"process {rank}: {traceback.format_exc()}"))
    sys.stdout.flush()
    os._exit(0)  # nothing of the parent's is cleaned up twice
