"""Runs of a results folder as the report needs them: read from their files, whatever is missing."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from blipfit import grid, methods, run_folder
from blipfit.errors import UserError
from blipfit.model import families
from blipfit.recipe import Family, Recipe, from_mapping
from blipfit.report import published, terminal
from blipfit.report.numbers import Number, Record
from blipfit.run_folder import Evaluation, Run

MAX_DEPTH = 2
"""Run folders are at most so deep in a folder that is given: RESULTS/DATASET/EXPERIMENT."""
_SAME_RESULT = ("performance.", "evaluation.batch_size", "training.batch_size", "training.accumulation")
"""Fields of a recipe that change a result by rounding only, if the effective batch is the same."""


@dataclass(frozen=True, slots=True)
class Experiment:
    """One run, finished or not."""

    run: Run
    dataset: str
    name: str
    result: Record | None
    """None if it is not finished or its result cannot be read."""
    recipe: Recipe | None
    """None if it cannot be read."""
    reason: str = ""
    """Why there is no result."""
    log: Record = field(default_factory=lambda: Record("", []))
    """One object per epoch."""
    evaluations: Sequence[Record] = ()

    @property
    def adapter(self) -> Mapping[str, Any]:
        """The adapter section of the recipe."""
        return {} if self.recipe is None else self.recipe.adapter.model_dump(mode="json")

    @property
    def placement(self) -> str:
        """`QF ffn · LLM attn`, or empty if the recipe cannot be read."""
        return terminal.format_placement(self.adapter) if self.adapter else ""

    @property
    def rank(self) -> int | None:
        """The LoRA rank, if the recipe has one."""
        if self.recipe is None or not self.recipe.adapter.has_lora:
            return None
        return self.recipe.adapter.rank if methods.has_rank(self.recipe.adapter.method) else None

    @property
    def model(self) -> str:
        """Name of the base model."""
        return "" if self.recipe is None else self.recipe.model.name

    @property
    def family(self) -> Family | None:
        """Family of the language model; None if it is not known."""
        return grid.family(self.name) or (families.read_family(self.model) if self.model else None)

    @property
    def is_generation(self) -> bool:
        """Whether answers were generated, so that the score is ROUGE-L and not accuracy."""
        return self.result is not None and self.result.get("metrics", "test", "method") == "generation"

    @property
    def measure(self) -> str:
        """Name of the score."""
        return "ROUGE-L" if self.is_generation else "accuracy"

    def score(self, split: str = "test") -> Number | None:
        """Accuracy in percent, or ROUGE-L × 100 if answers were generated."""
        if self.result is None:
            return None
        if self.is_generation:
            return self.result.number("metrics", split, "texts", "rougeL", "mean", factor=100)
        return self.result.number("metrics", split, "accuracy")

    def interval(self) -> tuple[Number, Number] | None:
        """The 95 % interval of the test score."""
        if self.result is None:
            return None
        if self.is_generation:
            return self.result.interval("metrics", "test", "texts", "rougeL", "interval", factor=100)
        return self.result.interval("metrics", "test", "interval")

    def number(self, *path: str | int, **options: Any) -> Number | None:
        """A number of the result."""
        return None if self.result is None else self.result.number(*path, **options)

    def differences(self) -> Mapping[str, Sequence[Any]]:
        """Fields that differ from the grid's recipe of the same name: field → [the grid's value, this one's]."""
        recorded = {} if self.result is None else self.result.mapping("differs_from_published")
        return {path: pair for path, pair in recorded.items() if isinstance(pair, list) and len(pair) == 2}

    def published(self) -> Number | None:
        """The published accuracy of the experiment of this name, whatever the recipe here."""
        return None if self.is_generation else published.accuracy(self.dataset, self.name)

    def is_comparable(self) -> bool:
        """Whether the published number was measured with this model and all questions."""
        if self.recipe is None or self.family is None or self.recipe.data.limit is not None:
            return False
        config = self.recipe.model
        return config.name == grid.MODELS[self.family] and config.quantization == "none"

    def other_settings(self) -> list[str]:
        """Fields that differ from the grid's recipe and can change the result."""
        fields = [path for path in self.differences() if not path.startswith(_SAME_RESULT)]
        batch = [path for path in self.differences() if path in ("training.batch_size", "training.accumulation")]
        return fields + (batch if batch and not self._has_grid_batch() else [])

    def _has_grid_batch(self) -> bool:
        if self.recipe is None:
            return False
        training = self.recipe.training
        return training.batch_size * training.accumulation == 16


@dataclass(frozen=True, slots=True)
class Collection:
    """All runs of one data set in one results folder."""

    folder: Path
    dataset: str
    title: str
    """The data set, with its folder if several folders hold runs of it."""
    key: str
    """Unique in a report; part of the ids in the page."""
    experiments: Sequence[Experiment]

    @property
    def finished(self) -> list[Experiment]:
        """Experiments with a result."""
        return [experiment for experiment in self.experiments if experiment.result is not None]

    @property
    def unfinished(self) -> list[Experiment]:
        """Experiments without a result."""
        return [experiment for experiment in self.experiments if experiment.result is None]

    @property
    def best(self) -> Experiment | None:
        """The finished experiment with the highest test score."""
        scored = [(score.value, experiment) for experiment in self.finished if (score := experiment.score())]
        return max(scored, key=lambda pair: pair[0])[1] if scored else None

    @property
    def measure(self) -> str:
        """Name of the score."""
        return next((experiment.measure for experiment in self.finished), "accuracy")

    def missing(self) -> list[str]:
        """Experiments of the grid that have no run folder here; empty if none of the grid has one."""
        names = {experiment.name for experiment in self.experiments}
        grid_names = [str(number) for number in grid.IDS]
        return [name for name in grid_names if name not in names] if names & set(grid_names) else []


def read_collections(paths: Sequence[Path]) -> list[Collection]:
    """The runs below results folders, data set folders or run folders.

    Raises UserError if a path is no folder, or if no run is in any of them.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder; give results folders (RESULTS/DATASET/EXPERIMENT) or run folders")
    runs = {run.folder.resolve(): run for path in paths for run in find_runs(path)}
    if not runs:
        names = ", ".join(map(str, paths))
        raise UserError(f"{names} holds no run; train one first, for example `blipfit train icons 28 --model tiny`")
    groups: dict[tuple[Path, str], list[Experiment]] = {}
    for folder, run in runs.items():
        experiment = read_experiment(run)
        groups.setdefault((folder.parent, experiment.dataset), []).append(experiment)
    datasets = [dataset for _, dataset in groups]
    collections = []
    for number, ((_, dataset), experiments) in enumerate(groups.items(), 1):
        folder = experiments[0].run.folder.parent
        title = dataset if datasets.count(dataset) == 1 else f"{dataset} in {folder}"
        ordered = sorted(_with_different_names(experiments), key=_sort_key)
        collections.append(Collection(folder, dataset, title, f"c{number}", ordered))
    return collections


def _with_different_names(experiments: Sequence[Experiment]) -> list[Experiment]:
    """Copies of a run folder are named by their folders."""
    counts = Counter(experiment.name for experiment in experiments)
    return [
        experiment if counts[experiment.name] == 1 else replace(experiment, name=experiment.run.folder.name)
        for experiment in experiments
    ]


def find_runs(path: Path, depth: int = MAX_DEPTH) -> list[Run]:
    """The run folders at a path and below it, ordered by path."""
    run = Run(path)
    if run.recipe_file.is_file() or run.result_file.is_file():
        return [run]
    if depth == 0:
        return []
    folders = sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    return [run for folder in folders for run in find_runs(folder, depth - 1)]


def read_experiment(run: Run) -> Experiment:
    """Read a run's files; what is missing or damaged becomes the reason why there is no result."""
    result, reason = None, ""
    if run.state() == "finished":
        try:
            result = Record(str(run.result_file), run.result())
        except UserError as error:
            reason = str(error)
    else:
        reason = _unfinished_reason(run)
    recipe = _read_recipe(run, result)
    dataset = run.folder.resolve().parent.name if recipe is None else recipe.data.name
    return Experiment(
        run,
        dataset,
        run.folder.resolve().name if recipe is None else recipe.experiment,
        result,
        recipe,
        reason,
        _read_log(run, result),
        [*_read_evaluations(run.evaluations())] if result is not None else (),
    )


def _unfinished_reason(run: Run) -> str:
    if run.failure_file.exists():
        try:
            return f"failed: {run.failure()}"
        except (UserError, KeyError, TypeError):
            return f"failed: {run.failure_file} cannot be read"
    if run.state() == "started":
        return "interrupted or still training: the same command again continues it"
    return "not finished: it has a recipe and no checkpoint yet"


def _read_recipe(run: Run, result: Record | None) -> Recipe | None:
    """From the result, which is faster to read than YAML, or else from the recipe's file."""
    try:
        values = {} if result is None else result.mapping("recipe")
        return from_mapping(values) if values else run.recipe()
    except UserError:
        return None


def _read_log(run: Run, result: Record | None) -> Record:
    """The lines of `log.jsonl`, up to one that is being written; without that file, the history in the result."""
    if run.log_file.is_file():
        return Record(str(run.log_file), list(_parse_lines(run.log_file.read_text("utf-8", errors="replace"))))
    history = [] if result is None else result.get("history")
    return Record(str(run.result_file), history if isinstance(history, list) else [], "/history")


def _parse_lines(text: str) -> Iterable[Any]:
    for line in text.split("\n"):
        try:
            yield json.loads(line)
        except ValueError:
            return


def _read_evaluations(evaluations: Iterable[Evaluation]) -> Iterable[Record]:
    for evaluation in evaluations:
        try:
            yield Record(str(evaluation.record_file), run_folder.read_json(evaluation.record_file))
        except UserError:
            continue


def read_model_evaluations(paths: Sequence[Path]) -> list[Record]:
    """The evaluations of models without a run in results folders, and of runs given as one."""
    return [
        record
        for path in dict.fromkeys(paths)
        for record in _read_evaluations(run_folder.find_evaluations(path, "evaluations/*/*"))
    ]


def _sort_key(experiment: Experiment) -> tuple[bool, int, str]:
    name = experiment.name
    is_number = published.is_in_grid(name)
    return not is_number, int(name) if is_number else 0, name
