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
        """The evaluation of the finished experiment on another data set or benchmark."""
        return Evaluation(self.folder / "evaluations" / name)

    @property
    def data_file(self) -> Path:
        """Hashes of the questions that it is trained and evaluated on, and of the base weights."""
        return self.folder / "data.json"

    @property
    def failure_file(self) -> Path:
        """Why the last attempt failed."""
        return self.folder / "failure.json"

    def fail(self, reason: str) -> None:
        """Record why the attempt failed."""
        write_json(self.failure_file, {"reason": reason})

    def failure(self) -> str:
        """The recorded reason of a failed attempt, or what is known without one."""
        return read_json(self.failure_file)["reason"] if self.failure_file.exists() else "not finished"

    def create(self) -> "Run":
        """Create the folder if it does not exist; returns the run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def state(self) -> State:
        """`started` if there is a checkpoint to continue from; a folder with only a recipe is `new`."""
        if self.result_file.exists():
            return "finished"
        return "started" if self.checkpoint.is_dir() and any(self.checkpoint.glob("*.safetensors")) else "new"

    def recipe(self) -> Recipe:
        """The run's recipe. Raises UserError if the folder has none."""
        if not self.recipe_file.exists():
            raise UserError(f"{self.folder} is not a run folder: it has no {self.recipe_file.name}")
        return recipes.load(self.recipe_file)

    def result(self) -> dict[str, Any]:
        """The result of a finished run. Raises UserError if it is missing or damaged."""
        result = read_json(self.result_file)
        expected = {"metrics": dict, "adapter_sha256": str}
        if not isinstance(result, dict) or any(not isinstance(result.get(k), t) for k, t in expected.items()):
            raise UserError(
                f"{self.result_file} is damaged: it must be an object with {', '.join(expected)}; "
                "copy the run folder again or train it again"
            )
        return result

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keep other processes out of the folder; a killed process leaves no lock.

        Raises UserError if another process is training there.
        """
        lock = filelock.FileLock(self.create().folder / ".lock", timeout=0)
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

    def claim(self, recipe: Recipe, data: str, base: str | None = None) -> State:
        """Create the folder for this recipe on these questions (`data`: their hash) and base weights (`base`: their
        digest, if known).

        Raises UserError if it holds results of another recipe, of other questions or of other base weights.
        """
        self.refuse_other(recipe, data, base)
        state = self.state()
        if state == "new":
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, recipe.to_yaml())
            write_json(self.data_file, {"sha256": data, **({} if base is None else {"base_sha256": base})})
        self.tidy()
        return state

    def refuse_other(self, recipe: Recipe, data: str, base: str | None = None) -> None:
        """Raise UserError if the folder holds results of another recipe, of other questions (`data`: their hash) or of
        other base weights (`base`: their digest, if known)."""
        if self.state() == "new":
            return
        contents = "results" if self.state() == "finished" else "an unfinished run"
        fix = "choose another --results folder or experiment name"
        if differences := self.recipe().differences(recipe):
            listed = ", ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in differences.items())
            raise UserError(f"{self.folder} holds {contents} of another recipe ({listed}); {fix}")
        if not self.data_file.exists():
            return
        recorded = read_json(self.data_file)
        if not isinstance(recorded, dict) or "sha256" not in recorded:
            raise UserError(f"{self.data_file} is damaged: it must be an object with sha256; {fix}")
        if recorded["sha256"] != data:
            raise UserError(f"{self.folder} holds {contents} on other questions than --data has now; {fix}")
        if base is not None and recorded.get("base_sha256", base) != base:
            raise UserError(
                f"{self.folder} holds {contents} with other weights of {recipe.model.name} than it has now; restore "
                f"them, or {fix}"
            )

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to `log.jsonl`, in one call, so that a killed run leaves whole lines."""
        with self.log_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def truncate_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop log lines that a continued run will write again, and a last line that a kill cut off."""
        if not self.log_file.exists():
            return
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        complete = [json.loads(line) for line in text.split("\n")[:-1]]
        write_lines(self.log_file, [line for line in complete if keep(line)])

    def tidy(self) -> None:
        """Remove the temporary folders of writes that a kill interrupted."""
        for folder in (self.folder, self.checkpoint):
            for temporary in folder.glob(".*"):
                if temporary.is_dir():
                    shutil.rmtree(temporary, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The folder of one evaluation of a model or run on one data set; a new evaluation replaces it."""

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

    def judgements_file(self, subject: str) -> Path:
        """Judgments in VL-RewardBench's format; `subject` is `base` or `tuned`."""
        return self.folder / f"judgements-{subject}.jsonl"

    def answers(self, subject: str) -> Path:
        """Folder of MME's answer files in the official format; `subject` is `base` or `tuned`."""
        return self.folder / f"answers-{subject}"


def versions() -> dict[str, str]:
    """Versions of the packages that a result depends on."""
    names = ("torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors", "numpy", "pillow")
    return {
        "blipfit": blipfit.__version__,
        "python": platform.python_version(),
        **{name: installed_version(name) for name in names},
    }


def installed_version(package: str) -> str:
    """Version of a package, or `unknown` if Python finds no metadata of it (a source folder on the path has none)."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def find(results: Path) -> list[Run]:
    """All finished runs below a results folder, ordered by path."""
    return [Run(file.parent) for file in sorted(results.glob("*/*/result.json"))]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it replaces `path`, on failure it is removed.

    Works for files and for folders: create either at the yielded path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary_folder = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    temporary = temporary_folder / path.name
    try:
        yield temporary
        if temporary.is_dir() and path.exists():
            os.replace(path, temporary_folder / "previous")  # a folder cannot be renamed over a full one
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary_folder, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole file in UTF-8; a kill leaves the old one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a whole JSON file, indented."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file."""
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing or not valid JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read a JSONL file."""
    # Not splitlines(): a text may contain other line ends, which JSON leaves as they are.
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
