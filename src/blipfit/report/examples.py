"""Test questions with the answers of all experiments, with small pictures if the data folder is still there."""

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from PIL import Image

from blipfit import data
from blipfit.data.images import open_image
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.report.experiments import Collection, Experiment
from blipfit.run_folder import Run

MAX_EXAMPLES = 60
"""Most examples per data set."""
CANDIDATES = 400
"""Examples are selected among so many questions at the beginning of the test split, to keep the report fast."""
THUMBNAIL = 120
"""Longest side of a picture, in pixels."""
_MAX_TEXT = 600
_GROUP_TAGS = ("skill", "subject")
_MAX_GROUPS = 20
_TEST_LINE = '{"split": "test"'


@dataclass(frozen=True, slots=True)
class Example:
    """One test question with everybody's answer."""

    id: str
    answer: str
    """The right answer."""
    predictions: Mapping[str, Sequence[str]]
    """Answer → names of the experiments that give it, the most frequent first."""
    right: Sequence[str]
    """Names of the experiments that are right."""
    wrong: Sequence[str]
    question: str = ""
    choices: Sequence[str] = ()
    group: str = ""
    picture: str = ""
    """A `data:` URL, or empty."""

    @property
    def agreement(self) -> float:
        """Share of the experiments that are right, 0 to 1."""
        return len(self.right) / (len(self.right) + len(self.wrong))

    @property
    def is_disputed(self) -> bool:
        """Whether some experiments are right and others wrong."""
        return bool(self.right and self.wrong)


@dataclass(frozen=True, slots=True)
class ExampleSet:
    """The examples of one data set."""

    collection: Collection
    examples: Sequence[Example]
    experiments: Sequence[str]
    """Names of the experiments that answered them."""
    note: str
    """How the examples were selected, and why texts or pictures are missing, if they are."""

    @property
    def index(self) -> dict[str, int]:
        """Experiment → its place in `experiments`."""
        return {name: number for number, name in enumerate(self.experiments)}

    @property
    def groups(self) -> list[str]:
        """The different groups of the questions, sorted."""
        return sorted({example.group for example in self.examples if example.group})


@dataclass(slots=True)
class _Answers:
    """What the experiments answered to one question."""

    answer: str
    by_experiment: dict[str, tuple[str, bool]] = field(default_factory=dict)
    """Experiment → its answer, and whether that is right."""


def make_example_set(collection: Collection, data_folders: Sequence[Path]) -> ExampleSet | None:
    """Select examples of a collection's test split; None if no experiment has predictions.

    `data_folders`: where its data may be; the first folder whose questions are those of the runs is read.
    """
    experiments, left_out = _same_questions(collection.finished)
    answers = read_answers(experiments)
    examples = select_examples([_make_example(name, entry) for name, entry in answers.items()])
    if not examples:
        return None
    order = ", first those on which the experiments disagree most" if len(experiments) > 1 else ""
    notes = [f"{len(examples)} of the first {len(answers)} questions of the test split{order}"]
    if left_out:
        notes.append(f"{left_out} experiments were evaluated on other questions and are left out")
    questions, problem = find_questions(collection, experiments, examples, data_folders)
    if problem:
        notes.append(problem)
    groups = _read_groups(questions.values())
    examples = [_add_question(example, questions.get(example.id), groups) for example in examples]
    if questions and any(not example.picture for example in examples):
        notes.append("some pictures cannot be read any more")
    names = [experiment.name for experiment in experiments]
    return ExampleSet(collection, examples, names, "; ".join(notes) + ".")


def _same_questions(experiments: Sequence[Experiment]) -> tuple[list[Experiment], int]:
    """The largest group of experiments with equal test questions, and how many others there are."""
    groups: dict[Any, list[Experiment]] = {}
    for experiment in experiments:
        result = experiment.result
        digest = result.text("questions_sha256", "test") if result else ""
        groups.setdefault(digest, []).append(experiment)
    largest = max(groups.values(), key=len, default=[])
    return largest, len(experiments) - len(largest)


def read_answers(experiments: Sequence[Experiment], limit: int = CANDIDATES) -> dict[str, _Answers]:
    """The answers to the first `limit` test questions by question id; damaged lines are skipped."""
    answers: dict[str, _Answers] = {}
    for experiment in experiments:
        for line in _read_predictions(experiment.run, limit):
            identity, answer, prediction = (line.get(key) for key in ("id", "answer", "prediction"))
            if isinstance(identity, str) and isinstance(answer, str) and isinstance(prediction, str):
                entry = answers.setdefault(identity, _Answers(answer))
                entry.by_experiment[experiment.name] = (prediction, line.get("correct") is True)
    return answers


def _read_predictions(run: Run, limit: int) -> Iterator[Mapping[str, Any]]:
    """The first test lines of `predictions.jsonl`; the lines of other splits are not parsed."""
    if not run.predictions_file.is_file():
        return
    count = 0
    with run.predictions_file.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            if not text.startswith(_TEST_LINE):
                continue
            if count == limit:
                return
            count += 1
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict):
                yield line


def _make_example(identity: str, answers: _Answers) -> Example:
    predictions: dict[str, list[str]] = {}
    for name, (prediction, _) in answers.by_experiment.items():
        predictions.setdefault(prediction, []).append(name)
    ordered = dict(sorted(predictions.items(), key=lambda item: -len(item[1])))
    right = [name for name, (_, is_right) in answers.by_experiment.items() if is_right]
    wrong = [name for name, (_, is_right) in answers.by_experiment.items() if not is_right]
    return Example(identity, answers.answer, ordered, right, wrong)


def select_examples(examples: Sequence[Example], count: int = MAX_EXAMPLES) -> list[Example]:
    """Two thirds are questions on which the experiments disagree most, the others all right or all wrong, if there are.

    The order is by disagreement, then that of the test split.
    """
    disputed = sorted((e for e in examples if e.is_disputed), key=lambda example: abs(example.agreement - 0.5))
    all_right = [example for example in examples if not example.wrong]
    all_wrong = [example for example in examples if not example.right]
    reserve = min(count // 3, len(all_right) + len(all_wrong))
    selected = disputed[: count - reserve]
    rest = count - len(selected)
    wrong_count = max(rest // 2, rest - len(all_right))
    selected += all_wrong[:wrong_count]
    selected += all_right[: count - len(selected)]
    return selected


def find_questions(
    collection: Collection, experiments: Sequence[Experiment], examples: Sequence[Example], folders: Sequence[Path]
) -> tuple[dict[str, Question], str]:
    """The questions of the runs' test split by id, or none and the reason."""
    recipe = next((experiment.recipe for experiment in experiments if experiment.recipe), None)
    limit = None if recipe is None else recipe.data.limit
    recorded = {experiment.result.text("questions_sha256", "test") for experiment in experiments if experiment.result}
    digest = next(iter(recorded), "")
    existing = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    for folder in existing:
        try:
            questions = data.load(collection.dataset, folder, "test", limit)
        except UserError:
            continue
        by_id = {question.id: question for question in questions}
        if data.fingerprint([questions]) == digest if digest else _have_answers(by_id, examples):
            return by_id, ""
    where = ", ".join(map(str, existing)) or "none of " + ", ".join(map(str, folders))
    reason = "holds other questions than the runs" if existing else "exists"
    return {}, f"without questions and pictures: {where} {reason}; give the data folder with --data DIR"


def _have_answers(questions: Mapping[str, Question], examples: Sequence[Example]) -> bool:
    """Whether the examples' answers are those of the questions; for runs that recorded no hash."""
    return all(example.id in questions and questions[example.id].answer in example.answer for example in examples)


def _read_groups(questions: Any) -> dict[str, str]:
    """The group of each question: its first tag with few different values."""
    questions = list(questions)
    for tag in _GROUP_TAGS:
        values = {question.tags[tag] for question in questions if tag in question.tags}
        if 1 < len(values) <= _MAX_GROUPS:
            return {question.id: question.tags.get(tag, "") for question in questions}
    return {}


def _add_question(example: Example, question: Question | None, groups: Mapping[str, str]) -> Example:
    if question is None:
        return example
    text = question.question
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + " …"
    return replace(
        example,
        question=text,
        choices=question.choices,
        group=groups.get(example.id, ""),
        picture=make_thumbnail(question),
    )


def make_thumbnail(question: Question) -> str:
    """A question's image as a `data:` URL of a small JPEG; empty if the image cannot be read."""
    try:
        image = open_image(question.image, question.transparency)
    except UserError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
