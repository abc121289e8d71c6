"""Commands that get signals, for test_interruptions.py: real processes, forked from one that has imported everything.

`python signaled_runs.py FOLDER` prints JSON: for every case the exit code, what was printed, and what differs.
`python signaled_runs.py FOLDER KILLS` kills commands at random times with SIGKILL, starts each again until it ends by
itself, and prints for each command the number of kills and what differs from a run without kills.
"""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from killed_runs import LOCKS, contents

SETTINGS = ["training.max_epochs=3", "training.patience=3", "training.batch_size=4", "training.accumulation=1"]
SETTINGS += ["evaluation.batch_size=2"]


class Command:
    """A forked process that runs a command line of blipfit."""

    def __init__(self, arguments: Sequence[str], log: Path):
        self.log = log
        self.process = os.fork()
        if self.process == 0:
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code: Any = 1
            try:
                from blipfit.__main__ import main

                sys.argv = ["blipfit", *arguments]
                main()
            except SystemExit as error:
                code = error.code
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait_for(self, condition: Callable[[], bool]) -> None:
        """Wait until a file appears, for example; raises TimeoutError if the command ends before."""
        while not condition():
            if os.waitpid(self.process, os.WNOHANG)[0]:
                raise TimeoutError(f"the command ended too early: {self.log.read_text()}")
            time.sleep(0.002)

    def end(self, *signals: int) -> dict[str, Any]:
        """Send signals and wait for the end; returns the exit code and the last line that was printed."""
        for number in signals:
            os.kill(self.process, number)
        code = os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])
        return {"code": code, "last": (self.log.read_text().splitlines() or [""])[-1]}


def hidden(folder: Path) -> list[str]:
    """Temporary files and folders that are left below a folder."""
    return [str(path.relative_to(folder)) for path in folder.rglob(".*") if not LOCKS & set(path.parts)]


def differences(folder: Path, expected: dict[str, Any]) -> list[str]:
    """Names of the files below a folder that are not as expected."""
    files = contents(folder)
    return [name for name in sorted({*files, *expected}) if files.get(name) != expected.get(name)]


def prepare_process(folder: Path) -> None:
    """Import what commands need, so that the forked ones need not, and draw the data."""
    import peft  # noqa: F401
    import torch

    from blipfit import cli, sweep  # noqa: F401
    from blipfit.commands import evaluate, shrink  # noqa: F401
    from blipfit.data import icons
    from blipfit.training import loop  # noqa: F401

    torch.set_num_threads(1)
    icons.prepare(folder / "data", train=16, val=6, test=6)


def training(command: str, folder: Path, results: Path, *options: str) -> list[str]:
    """The command line of a training of two experiments, one of them with a larger rank."""
    ids = ["icons", "13", "16", "--model", "tiny", "--device", "cpu", "--data", str(folder / "data")]
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return [command, *ids, *settings, *options, "--results", str(results)]


def signal_cases(folder: Path) -> dict[str, Any]:
    """Train with a signal in the second epoch, then again; and prepare data with a signal."""
    prepare_process(folder)

    def train(name: str) -> Command:
        return Command(training("train", folder, folder / name), folder / f"{name}.log")

    assert train("straight").end()["code"] == 0
    expected = contents(folder / "straight")
    cases: dict[str, Any] = {}
    signals = {name: [getattr(signal, name)] for name in ("SIGTERM", "SIGINT", "SIGUSR1")}
    for name, numbers in {**signals, "two": [signal.SIGTERM, signal.SIGINT]}.items():
        command, run = train(name), folder / name / "icons" / "13"
        command.wait_for((run / "log.jsonl").exists)
        case = cases[name] = command.end(*numbers)
        case |= {"hidden": hidden(folder / name), "is_finished": (run / "result.json").exists()}
        case["saves"] = len(list((run / "checkpoint").glob("state-*")))
        if name in ("SIGTERM", "two"):
            case |= {"again": train(name).end()["code"], "differences": differences(folder / name, expected)}
    command = Command(
        ["prepare", "icons", "--questions", "2000", "--to", str(folder / "drawn")], folder / "prepare.log"
    )
    command.wait_for(lambda: any(folder.glob(".drawn.*")))
    cases["prepare"] = {**command.end(signal.SIGTERM), "exists": (folder / "drawn").exists(), "hidden": hidden(folder)}
    return cases


def random_kills(folder: Path, kills: int) -> dict[str, Any]:
    """Kill each of six commands about equally often, at times spread over its duration."""
    prepare_process(folder)
    times, data, cpu = random.Random(0), str(folder / "data"), ("--device", "cpu")
    shrink = ["shrink", "--model", "tiny-t5", "--layers", "2", "--importance", "magnitude", *cpu]
    assert Command(training("train", folder, folder / "run"), folder / "run.log").end()["code"] == 0
    run = folder / "run" / "icons" / "13"
    commands: dict[str, Callable[[Path], list[str]]] = {
        "train": lambda to: training("train", folder, to, "--save-every", "2"),
        "sweep": lambda to: training("sweep", folder, to, "--save-every", "2", "--bank", "2"),
        "prepare": lambda to: ["prepare", "icons", "--questions", "300", "--to", str(to / "icons")],
        "features": lambda to: [
            "features",
            "build",
            "--on",
            "icons",
            "--data",
            data,
            "--store",
            str(to),
            "--device",
            "cpu",
        ],
        "evaluate": lambda to: ["evaluate", str(to / "13"), "--on", f"icons={data}", *cpu],
        "shrink": lambda to: [*shrink, "--to", str(to / "smaller")],
    }
    report: dict[str, Any] = {}
    for name, arguments in commands.items():

        def start(to: Path, name: str = name, arguments: Callable[[Path], list[str]] = arguments) -> Command:
            if name == "evaluate" and not to.exists():
                shutil.copytree(run, to / "13")
            return Command(arguments(to), folder / f"{name}.log")

        started = time.monotonic()
        last = start(folder / name).end()
        assert last["code"] == 0, last
        seconds, expected = time.monotonic() - started, contents(folder / name)
        shutil.rmtree(folder / name)
        case = report[name] = {"kills": 0, "runs": 0, "differences": [], "seconds": round(seconds, 1)}
        while case["kills"] < kills / len(commands):
            case["runs"] += 1
            to, code = folder / name, -9  # always the same path, because records name it
            while code == -9:
                command = start(to)
                time.sleep(times.uniform(0, 1.1 * seconds))
                code = command.end(signal.SIGKILL)["code"]
                case["kills"] += code == -9
            if code != 0 and name != "shrink":  # shrink refuses the folder if it was killed after its last write
                case["differences"].append(f"exit code {code}")
            case["differences"] += differences(to, expected) + hidden(to)
            shutil.rmtree(to)
        print(name, case, file=sys.stderr, flush=True)
    return report


if __name__ == "__main__":
    root = Path(sys.argv[1]).resolve()
    print(json.dumps(random_kills(root, int(sys.argv[2])) if sys.argv[2:] else signal_cases(root)))
