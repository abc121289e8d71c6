"""Training runs that are killed at file-system events, for test_interruptions.py.

Run as a program: it loads the model once and forks a process for every training, so that a kill is a real end of a
process and costs no import. Prints JSON: the number of events, of kills or of states, and what differs.

`python killed_runs.py FOLDER kill N` kills a training at every N-th event and starts it again.
`python killed_runs.py FOLDER states PROCESSES` copies the results at every event, which is what a kill there leaves,
and continues from every copy that differs from the one before it.
"""

import builtins
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

EPOCHS, INTERVAL_STEPS = 2, 1
LOCKS = {".lock", ".owner"}
"""Names of the files and folders of a lock in a run folder."""


class FileEvents:
    """Calls `on_event(number)` before every change of the files below a folder."""

    CALLS = ("replace", "rename", "unlink", "remove", "rmdir", "mkdir", "link", "symlink", "truncate", "fsync", "write")

    def __init__(self, folder: Path, on_event: Callable[[int], None]):
        self.folder, self.on_event = str(folder), on_event
        self.names: list[str] = []

    def install(self) -> None:
        for name in self.CALLS:
            setattr(os, name, self._watch(name, getattr(os, name)))
        os.open = self._watch_open("os.open", os.open, lambda args: bool(args[1] & (os.O_WRONLY | os.O_RDWR)))
        opened = self._watch_open("open", io.open, lambda args: len(args) > 1 and bool(set("wax+") & set(str(args[1]))))
        builtins.open = io.open = opened

    def _is_inside(self, target: Any, dir_fd: int | None) -> bool:
        if isinstance(target, int) or dir_fd is not None:
            try:
                target = os.readlink(f"/proc/self/fd/{target if isinstance(target, int) else dir_fd}")
            except OSError:
                return False
        return os.fsdecode(os.path.abspath(target)).startswith(self.folder + os.sep)

    def _count(self, name: str, target: Any) -> None:
        if threading.current_thread() is not threading.main_thread():  # signs of life of a lock, at any time
            return
        self.names.append(f"{name} {target}".replace(self.folder, "."))
        self.on_event(len(self.names) - 1)

    def _watch(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(target: Any, *args: Any, **options: Any) -> Any:
            if self._is_inside(target, options.get("dir_fd")):
                self._count(name, target)
            return call(target, *args, **options)

        return watched

    def _watch_open(
        self, name: str, call: Callable[..., Any], writes: Callable[[tuple[Any, ...]], bool]
    ) -> Callable[..., Any]:
        def watched(*args: Any, **options: Any) -> Any:
            is_write = not isinstance(args[0], int) and writes((*args, *options.values()))
            if not (is_write and self._is_inside(args[0], options.get("dir_fd"))):
                return call(*args, **options)
            self._count(name, args[0])
            result = call(*args, **options)
            self._count(f"{name}, now empty", args[0])
            return result

        return watched


def in_fork(work: Callable[[], None]) -> int:
    """Run a function in a forked process; returns its exit code, -9 if it was killed."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            work()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def contents(results: Path) -> dict[str, Any]:
    """All files below a folder by name, without times and locks; that of a killed process is free."""

    def timeless(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: timeless(item) for key, item in value.items() if key not in ("seconds", "created")}
        return [timeless(item) for item in value] if isinstance(value, list) else value

    files: dict[str, Any] = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if LOCKS & set(path.parts):
            continue
        if path.is_dir():
            files[name] = "folder"
        elif path.suffix == ".json":
            files[name] = timeless(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            files[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".safetensors":
            content = path.read_bytes()  # an 8-byte length, a JSON header whose keys have no order, the tensors
            length = int.from_bytes(content[:8], "little")
            files[name] = [json.loads(content[8 : 8 + length]), content[8 + length :].hex()]
        else:
            files[name] = path.read_bytes().hex()
    return files


class Bank:
    """Four experiments of one bank: three placements, ranks 1 to 8; the one with the largest rank stops early."""

    def __init__(self, folder: Path, dataset: Path):
        import peft  # noqa: F401 (its import takes longer than a training here; the forked processes have it)
        import torch

        from blipfit import grid
        from blipfit.training import loop  # noqa: F401 (imported once, not in every process)
        from blipfit.training.model_cache import ModelCache

        torch.set_num_threads(1)
        self.folder, self.dataset = folder, dataset
        changes = [f"training.max_epochs={EPOCHS}", "training.batch_size=4", "training.accumulation=1"]
        changes += ["evaluation.batch_size=2", "training.learning_rate=0.002"]
        self.recipes = [grid.recipe("icons", number, "tiny").override(changes) for number in (13, 16, 30, 18)]
        self.recipes[1] = self.recipes[1].override(["training.max_epochs=1"])
        self.model_cache = ModelCache("cpu", store=folder / "store")
        self.model_cache.backbone(self.recipes[0])

    def train(self, results: Path, on_event: Callable[[int], None] = lambda number: None) -> int:
        """Train in a forked process; returns its exit code."""

        def work() -> None:
            from blipfit.runtime.save_interval import SaveInterval
            from blipfit.training.loop import train

            events = FileEvents(results, on_event)
            events.install()
            interval = SaveInterval(seconds=None, steps=INTERVAL_STEPS)
            train(self.recipes, self.dataset, results, model_cache=self.model_cache, save_interval=interval)
            results.with_suffix(".events").write_text(json.dumps(events.names))

        return in_fork(work)

    def compare_restart(self, results: Path, expected: dict[str, Any]) -> str:
        """Start the training again; returns what differs from one without a kill, or an empty text."""
        if (code := self.train(results)) != 0:
            return f"the second attempt ends with {code}"
        files = contents(results)
        return ", ".join(name for name in sorted({*files, *expected}) if files.get(name) != expected.get(name))


def kill_at(number: int) -> Callable[[int], None]:
    """A listener for FileEvents that kills the process before event `number`."""
    return lambda event: os.kill(os.getpid(), signal.SIGKILL) if event == number else None


def kill(bank: Bank, every: int) -> dict[str, Any]:
    """Kill a training at every N-th event, and start it again."""
    assert bank.train(bank.folder / "straight") == 0
    expected = contents(bank.folder / "straight")
    names = json.loads((bank.folder / "straight.events").read_text())
    differences = {}
    for number in (kills := range(every // 2, len(names), every)):
        results = bank.folder / f"killed-{number}"
        code = bank.train(results, kill_at(number))
        difference = bank.compare_restart(results, expected) if code == -9 else f"exit code {code} instead of a kill"
        if difference:
            differences[f"{number} {names[number]}"] = difference
        shutil.rmtree(results)
    return {"events": len(names), "kills": len(kills), "differences": differences}


class States:
    """Copies of a folder at its file-system events; equal ones are stored once."""

    def __init__(self, folder: Path, copies: Path):
        self.folder, self.copies = folder, copies
        self.digests: set[str] = set()

    def store(self, number: int) -> None:
        digest = hashlib.sha256()
        for path in sorted(self.folder.rglob("*")):
            digest.update(re.sub(r"-[a-z0-9_]{8}(?=/|$)", "", str(path)).encode())  # random names of temporary folders
            is_content = path.is_file() and not LOCKS & set(path.parts)
            digest.update(path.read_bytes() if is_content else b"")
        if digest.hexdigest() not in self.digests:
            self.digests.add(digest.hexdigest())
            shutil.copytree(self.folder, self.copies / f"{number:05d}")


def continue_from_states(bank: Bank, processes: int) -> dict[str, Any]:
    """Continue a training from what a kill at each of its events would leave."""
    straight, copies = bank.folder / "straight", bank.folder / "states"
    straight.mkdir()
    assert bank.train(straight, States(straight, copies).store) == 0
    expected, names = contents(straight), json.loads((bank.folder / "straight.events").read_text())
    states = sorted(copies.iterdir())

    def work(process: int) -> None:
        differences = {}
        for count, state in enumerate(share := states[process::processes]):
            if difference := bank.compare_restart(state, expected):
                differences[f"{state.name} {names[int(state.name)]}"] = difference
            shutil.rmtree(state)
            print(f"{count + 1} of {len(share)}: {state.name} {difference or 'same'}", file=sys.stderr, flush=True)
        (bank.folder / f"differences-{process}.json").write_text(json.dumps(differences))

    workers = []
    for process in range(processes):
        if (worker := os.fork()) == 0:
            os._exit(in_fork(lambda process=process: work(process)))
        workers.append(worker)
    codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
    assert codes == [0] * processes, codes
    differences = [
        json.loads((bank.folder / f"differences-{process}.json").read_text()) for process in range(processes)
    ]
    return {
        "events": len(names),
        "states": len(states),
        "differences": {k: v for d in differences for k, v in d.items()},
    }


if __name__ == "__main__":
    root, mode, argument = Path(sys.argv[1]).resolve(), sys.argv[2], int(sys.argv[3])
    bank = Bank(root, root / "data")
    print(json.dumps(kill(bank, argument) if mode == "kill" else continue_from_states(bank, argument)))
