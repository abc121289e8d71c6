"""The run folder: its names, whole-file writes, and what is finished.

This is the only file that knows the names inside `results/DATASET/EXPERIMENT/` and of evaluations.
"""

import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import filelock

import blipfit
from blipfit import recipe as recipes
from blipfit.errors import UserError
from blipfit.recipe import Recipe

State = Literal["new", "started", "finished"]


@dataclass(frozen=True, slots=True)
class Run:
    """One experiment's folder."""

    folder: Path

    @classmethod
    def of(cls, results: Path, recipe: Recipe) -> "Run":
        return cls(results / recipe.data.name / recipe.experiment)

    @property
    def recipe_file(self) -> Path:
        return self.folder / "recipe.yaml"

    @property
    def log_file(self) -> Path:
        return self.folder / "log.jsonl"

    @property
    def checkpoint(self) -> Path:
        """Resume state: `state.safetensors` and `state.json`."""
        return self.folder / "checkpoint"

    @property
    def adapter(self) -> Path:
        """PEFT-format adapter of the best epoch, the always-trained tensors beside it."""
        return self.folder / "adapter"

    @property
    def predictions_file(self) -> Path:
        return self.folder / "predictions.jsonl"

    @property
    def ranks_file(self) -> Path:
        """AdaLoRA: the ranks of every layer after each allocation."""
        return self.folder / "ranks.json"

    @property
    def ranks_picture(self) -> Path:
        """The heat map that `blipfit ranks` draws."""
        return self.folder / "ranks.png"

    @property
    def result_file(self) -> Path:
        return self.folder / "result.json"

    def evaluation(self, name: str) -> "Evaluation":
        """Of the finished experiment on another data set or benchmark."""
        return Evaluation(self.folder / "evaluations" / name)

    @property
    def data_file(self) -> Path:
        """Which questions it was trained and judged on, as a hash."""
        return self.folder / "data.json"

    @property
    def failure_file(self) -> Path:
        """Why the last attempt ended, where it failed."""
        return self.folder / "failure.json"

    def fail(self, reason: str) -> None:
        write_json(self.failure_file, {"reason": reason})

    def failure(self) -> str:
        """The recorded reason of a failed attempt, or what is known without one."""
        return read_json(self.failure_file)["reason"] if self.failure_file.exists() else "not finished"

    def made(self) -> "Run":
        """The same run, its folder there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def state(self) -> State:
        """`started` once there is something to continue; a folder with a recipe alone is still free."""
        if self.result_file.exists():
            return "finished"
        return "started" if self.checkpoint.is_dir() and any(self.checkpoint.glob("*.safetensors")) else "new"

    def recipe(self) -> Recipe:
        if not self.recipe_file.exists():
            raise UserError(f"{self.folder} is not a run folder: it has no {self.recipe_file.name}")
        return recipes.load(self.recipe_file)

    def result(self) -> dict[str, Any]:
        return read_json(self.result_file)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other processes out of the folder; UserError if one is at work there. A killed one holds nothing."""
        lock = filelock.FileLock(self.made().folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"another process is training in {self.folder}; wait for it, or choose another --results folder"
            ) from None
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()

    def claim(self, recipe: Recipe, data: str) -> State:
        """Make the folder this recipe's on these questions (their hash), or refuse if it holds others' results."""
        self.refuse_other(recipe, data)
        state = self.state()
        if state == "new":
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, recipe.to_yaml())
            write_json(self.data_file, {"sha256": data})
        self.tidy()
        return state

    def refuse_other(self, recipe: Recipe, data: str) -> None:
        """UserError if the folder holds results of another recipe or of other questions."""
        if self.state() == "new":
            return
        what = "results" if self.state() == "finished" else "an unfinished run"
        mend = "choose another --results folder or experiment name"
        if differences := self.recipe().differences(recipe):
            told = ", ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in differences.items())
            raise UserError(f"{self.folder} holds {what} of another recipe ({told}); {mend}")
        if self.data_file.exists() and read_json(self.data_file)["sha256"] != data:
            raise UserError(f"{self.folder} holds {what} on other questions than --data has now; {mend}")

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line; a line is written by one call, so a killed run leaves whole lines."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def truncate_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop lines that a resumed run will write again, and a last line that a kill cut off."""
        if not self.log_file.exists():
            return
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        whole = [json.loads(line) for line in text.split("\n")[:-1]]
        write_lines(self.log_file, [line for line in whole if keep(line)])

    def tidy(self) -> None:
        """Remove the temporary folders of writes that a kill cut off."""
        for folder in (self.folder, self.checkpoint):
            for holder in folder.glob(".*"):
                if holder.is_dir():
                    shutil.rmtree(holder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What a model, or a run beside its model, came to on one data set; made anew it takes the old one's place."""

    folder: Path

    @classmethod
    def of_model(cls, results: Path, model: str, name: str) -> "Evaluation":
        """`results/evaluations/MODEL/NAME/`, for a model without a run."""
        return cls(results / "evaluations" / model.strip("./~").replace("/", "--") / name)

    @property
    def record_file(self) -> Path:
        return self.folder / "evaluation.json"

    @property
    def predictions_file(self) -> Path:
        return self.folder / "predictions.jsonl"

    def judgements_file(self, who: str) -> Path:
        """Judgements in VL-RewardBench's format."""
        return self.folder / f"judgements-{who}.jsonl"

    def answers(self, who: str) -> Path:
        """MME's answer files, in the official format."""
        return self.folder / f"answers-{who}"


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "pillow")
    return {
        "blipfit": blipfit.__version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in names},
    }


def installed_version(package: str) -> str:
    """Version of a package, or `unknown` where Python finds no metadata of it, as with a source folder on the path."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def find(results: Path) -> list[Run]:
    """All finished runs below a results folder, by path."""
    return [Run(file.parent) for file in sorted(results.glob("*/*/result.json"))]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling path; on success it takes `path`'s place, on failure it vanishes.

    Works for files and for folders: create either at the yielded path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = holder / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            os.replace(path, holder / "previous")  # a folder cannot be renamed over a full one
        os.replace(temporary, path)
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    # Not splitlines(): a text may hold other line ends that JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
