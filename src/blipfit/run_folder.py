"""The run folder: its names, whole-file writes, and what is finished.

This is the only file that knows the names inside `results/DATASET/EXPERIMENT/` and of evaluations.
"""

import json
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import blipfit
from blipfit import folder_lock
from blipfit import recipe as recipes
from blipfit.errors import UserError
from blipfit.file_writes import remove_leftovers, remove_temporary_folders
from blipfit.file_writes import replacing as replacing
from blipfit.recipe import Recipe

State = Literal["new", "started", "finished"]
LEFTOVER_SECONDS = 60.0
"""Age from which a temporary folder in a run folder is of a killed process; a living one writes it in seconds."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run is trained and evaluated with, identified by content; what is not known is empty or None."""

    questions_sha256: str
    """Hash of the questions of all splits."""
    questions: Mapping[str, str] = field(default_factory=dict)
    """Hash of the questions of each split."""
    images: Mapping[str, str] = field(default_factory=dict)
    """Digest of the images of each split: of every question's id and the content of its image."""
    base_sha256: str | None = None
    """Digest of the base weights; None if they are not downloaded yet."""
    teacher: Mapping[str, str | None] | None = None
    """Digests of the teacher's base weights (`base_sha256`) and adapter (`adapter_sha256`, None for a model)."""

    def to_json(self) -> dict[str, Any]:
        """Return what `data.json` holds."""
        known = {"questions": self.questions, "images": self.images, "teacher": self.teacher}
        base = {} if self.base_sha256 is None else {"base_sha256": self.base_sha256}
        return {
            "sha256": self.questions_sha256,
            **base,
            **{name: dict(value) for name, value in known.items() if value},
        }

    def find_differences(self, recorded: Mapping[str, Any], recipe: Recipe) -> list[str]:
        """Return what differs from a run's `data.json`, one phrase each; what either does not know is not compared."""
        if recorded["sha256"] != self.questions_sha256:
            return ["on other questions than --data has now"]
        differences = []
        images = recorded.get("images", {})
        if splits := [split for split, digest in self.images.items() if images.get(split, digest) != digest]:
            differences.append(f"on other images, under the same names, than --data has now in {', '.join(splits)}")
        base = recorded.get("base_sha256")
        if None not in (base, self.base_sha256) and base != self.base_sha256:
            differences.append(f"with other weights of {recipe.model.name} than it has now")
        if self.teacher and (teacher := recorded.get("teacher")):
            pairs = {name: (teacher.get(name), digest) for name, digest in self.teacher.items()}
            other_base = None not in pairs["base_sha256"] and len(set(pairs["base_sha256"])) > 1
            if other_base or len(set(pairs["adapter_sha256"])) > 1:
                differences.append(f"with another teacher than {recipe.distillation.teacher} is now")
        return differences


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
        """Resume state: the files of the last saves, and `scores.jsonl`; deleted when the run is finished."""
        return self.folder / "checkpoint"

    @property
    def partial_scores_file(self) -> Path:
        """The scores of a validation or test that is not finished."""
        return self.checkpoint / "scores.jsonl"

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

    def evaluations(self) -> "list[Evaluation]":
        """All complete evaluations of the finished experiment, ordered by name."""
        return find_evaluations(self.folder, "evaluations/*")

    @property
    def data_file(self) -> Path:
        """What it is trained and evaluated with, by content: see `Inputs`."""
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

    def lock(self) -> AbstractContextManager[None]:
        """Keep other processes out of the folder, see `lock_all`."""
        return lock_all([self])

    def claim(self, recipe: Recipe, inputs: Inputs) -> State:
        """Create the folder for this recipe and these inputs. Raises UserError as `refuse_other`."""
        self.refuse_other(recipe, inputs)
        state = self.state()
        if state == "new":
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.recipe_file, recipe.to_yaml())
            write_json(self.data_file, inputs.to_json())
        self.tidy()
        return state

    def refuse_other(self, recipe: Recipe, inputs: Inputs) -> None:
        """Raise UserError if the folder holds results of another recipe, or of other questions, images, base weights
        or another teacher."""
        if self.state() == "new":
            return
        contents = "results" if self.state() == "finished" else "an unfinished run"
        fix = "choose another --results folder or experiment name"
        if differences := self.recipe().differences(recipe):
            listed = ", ".join(f"{path} is {old!r} there and {new!r} here" for path, (old, new) in differences.items())
            raise UserError(f"{self.folder} holds {contents} of another recipe ({listed}); {fix}")
        recorded = self.inputs()
        if recorded is not None and (changes := inputs.find_differences(recorded, recipe)):
            raise UserError(
                f"{self.folder} holds {contents} {' and '.join(changes)}; restore what was changed, or {fix}"
            )

    def inputs(self) -> dict[str, Any] | None:
        """What `data.json` holds; None if an older blipfit wrote none. Raises UserError if it is damaged."""
        if not self.data_file.exists():
            return None
        recorded = read_json(self.data_file)
        parts = {"questions": dict, "images": dict, "teacher": dict}
        if (
            not isinstance(recorded, dict)
            or not isinstance(recorded.get("sha256"), str)
            or any(not isinstance(recorded.get(name, {}), kind) for name, kind in parts.items())
        ):
            raise UserError(f"{self.data_file} is damaged; copy the run folder again, or delete it and train again")
        return recorded

    def log(self, record: Mapping[str, Any]) -> None:
        """Add one line to `log.jsonl`. The file is written as a whole: an append could not be refused to a process that
        has lost the folder.

        Raises UserError if the disk is full.
        """
        lines = read_lines(self.log_file) if self.log_file.exists() else []
        write_lines(self.log_file, [*lines, record])

    def truncate_log(self, keep: Callable[[dict[str, Any]], bool]) -> None:
        """Drop log lines that a continued run will write again, and a last line that a kill cut off."""
        if not self.log_file.exists():
            return
        text = self.log_file.read_text(encoding="utf-8", errors="replace")
        complete = [json.loads(line) for line in text.split("\n")[:-1]]
        write_lines(self.log_file, [line for line in complete if keep(line)])

    def tidy(self) -> None:
        """Remove what a kill left: temporary folders and, if the run is finished, its checkpoint."""
        if self.result_file.exists():
            shutil.rmtree(self.checkpoint, ignore_errors=True)
            folder_lock.remove_traces(self.folder)
        for folder in (self.folder, self.checkpoint):
            remove_leftovers(folder, seconds=LEFTOVER_SECONDS)


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

    def judgments_file(self, subject: str) -> Path:
        """Judgments in VL-RewardBench's format; `subject` is `base` or `tuned`."""
        return self.folder / f"judgments-{subject}.jsonl"

    @property
    def partial_scores_file(self) -> Path:
        """The scores of an evaluation that is not finished."""
        return self.folder / "scores.jsonl"

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


@contextmanager
def lock_all(runs: Sequence[Run]) -> Iterator[None]:
    """Keep other processes out of the folders, on all hosts that share them; a killed process leaves no lock.

    A folder whose owner gives no sign of life is taken over: at once if the owner can be looked up, else after
    `folder_lock.LEASE_SECONDS`. Raises UserError if another process is training in one of them.
    """

    def clean(folder: Path) -> None:
        for location in (folder, Run(folder).checkpoint):
            remove_temporary_folders(location)

    with folder_lock.owning([run.create().folder for run in runs], clean):
        yield


def find(results: Path) -> list[Run]:
    """All finished runs below a results folder, ordered by path."""
    return [Run(file.parent) for file in sorted(results.glob("*/*/result.json"))]


def find_evaluations(folder: Path, pattern: str) -> list[Evaluation]:
    """All complete evaluations in a folder, ordered by path; in a results folder `pattern` is `evaluations/*/*`."""
    evaluations = [Evaluation(path) for path in sorted(folder.glob(pattern))]
    return [evaluation for evaluation in evaluations if evaluation.record_file.is_file()]


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
