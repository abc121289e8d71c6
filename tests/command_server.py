"""Run `blipfit` commands in forks of a process that has imported torch and all commands: they start in milliseconds.

As a script, this is the server: every line of its input is a JSON object that describes a command, every line of its
output the exit code.
"""

import atexit
import gc
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended; a negative code is the signal that killed it."""

    code: int
    stdout: str
    stderr: str


def run(arguments: Sequence[str | Path], *, ignore_estimates: bool = False) -> Outcome:
    """Run a command. `ignore_estimates`: as if a disk was filled after the command has found enough room."""
    with tempfile.TemporaryDirectory() as folder:
        request = {"arguments": [str(part) for part in arguments], "folder": folder, "environment": dict(os.environ)}
        server = _server()
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(json.dumps(request | {"ignore_estimates": ignore_estimates}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        texts = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
    return Outcome(code, *texts)


@cache
def _server() -> subprocess.Popen[str]:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _serve() -> None:
    import torch

    import blipfit

    torch.set_num_threads(1)  # a fork has only one thread, so the server must not have started others
    for module in pkgutil.walk_packages(blipfit.__path__, "blipfit."):
        if not module.name.startswith(("blipfit.pretraining", "blipfit.__main__")):
            importlib.import_module(module.name)
    gc.freeze()  # the forks share the memory of what is imported
    for line in sys.stdin:
        if (child := os.fork()) == 0:
            _run_command(**json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run_command(arguments: list[str], folder: str, environment: dict[str, str], ignore_estimates: bool) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    sys.argv = ["blipfit", *arguments]
    from blipfit import disk_space
    from blipfit.__main__ import main

    if ignore_estimates:
        disk_space.require_space = lambda *arguments: None
    code: str | int | None = 1
    try:
        main()
    except SystemExit as error:
        code = error.code
    except BaseException:
        traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code if isinstance(code, int) else 1)  # taking torch down takes longer than most commands


if __name__ == "__main__":
    _serve()
