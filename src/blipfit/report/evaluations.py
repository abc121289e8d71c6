"""Evaluations on other data sets and benchmarks, base models, and retention, from their records."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from blipfit.data.mme import COGNITION, MAX_SCORE, PERCEPTION
from blipfit.report import published
from blipfit.report.experiments import Collection
from blipfit.report.numbers import Number, Record

BASE, TUNED = "base", "tuned"


@dataclass(frozen=True, slots=True)
class EvaluationRow:
    """One metric of a run or model on one data set."""

    subject: str
    """The run, or the model without a run."""
    on: str
    """Data set and split."""
    questions: Number | None
    metric: str
    base: Number | None
    tuned: Number | None
    difference: Number | None
    interval: tuple[Number, Number] | None
    """95 % interval of the difference."""


METRICS: Mapping[str, tuple[tuple[str, ...], str, float]] = {
    "accuracy, %": (("accuracy",), "accuracy", 1),
    "perception": (("perception",), "perception", 1),
    "cognition": (("cognition",), "cognition", 1),
    "pairwise accuracy (sum), %": (("likelihood_sum", "pooled", "accuracy"), "pairwise_sum", 1),
    "pairwise accuracy (mean), %": (("likelihood_mean", "pooled", "accuracy"), "pairwise_mean", 1),
    "ROUGE-L, %": (("texts", "rougeL", "mean"), "rougeL", 100),
    "ROUGE-L of answers, %": (("answers", "texts", "rougeL", "mean"), "rougeL", 100),
    "CLIP score": (("clip_score", "mean"), "clip_score", 1),
    "CLIP score of answers": (("answers", "clip_score", "mean"), "clip_score", 1),
}
"""Printed metrics: path below `base` and `tuned`, key below `difference`, factor."""


def make_rows(records: Sequence[Record]) -> list[EvaluationRow]:
    """One row per metric of every evaluation."""
    return [row for record in records for row in _record_rows(record)]


def subject_of(record: Record) -> str:
    """The run that was evaluated, or the model."""
    return record.text("run") or record.text("model")


def _record_rows(record: Record) -> list[EvaluationRow]:
    rows = []
    for metric, (path, key, factor) in METRICS.items():
        if record.get(BASE, "method") == "generation" and record.get(BASE, "judge") is None and metric == "accuracy, %":
            metric = "exact match, %"
        base, tuned = (record.number(variant, *path, factor=factor) for variant in (BASE, TUNED))
        if (base is None and tuned is None) or _is_empty_total(record, metric):
            continue
        difference = tuned.minus(base) if base and tuned else None
        rows.append(
            EvaluationRow(
                subject_of(record),
                f"{record.text('on')} {record.text('split')}",
                record.number("questions", digits=0),
                metric,
                base,
                tuned,
                difference,
                record.interval("difference", key, "interval") if difference else None,
            )
        )
    return rows


def _is_empty_total(record: Record, metric: str) -> bool:
    """Whether a total of MME has no subtask with questions."""
    subtasks = {"perception": PERCEPTION, "cognition": COGNITION}.get(metric)
    return subtasks is not None and not set(subtasks) & set(record.mapping(BASE, "subtasks"))


@dataclass(frozen=True, slots=True)
class MMETable:
    """MME's subtasks with the scores of several models."""

    columns: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Number | None]]]
    """Subtask and one score per column."""
    totals: Sequence[tuple[str, Sequence[Number | None]]]
    notes: Sequence[str]
    maximum: int = MAX_SCORE


def make_mme_table(records: Sequence[Record]) -> MMETable | None:
    """All models evaluated on MME; a published model beside them if the questions are those of the benchmark."""
    evaluated = [record for record in records if record.get(BASE, "judge") == "mme"]
    if not evaluated:
        return None
    sources = _mme_sources(evaluated)
    notes = [
        f"{subject_of(record)}: not the MME benchmark: {text}"
        for record in evaluated
        for text in record.get(BASE, "deviations") or []
    ]
    if any(record.get(BASE, "benchmark") is True for record in evaluated):
        reference = published.record()
        sources += [(f"{name}, published", reference, ("mme", name)) for name in reference.mapping("mme")]
    else:
        notes.append("No published scores beside these, because the questions are not those of the benchmark.")
    present = {name for _, record, path in sources for name in record.mapping(*path, "subtasks")}
    rows = [
        (name.replace("_", " "), [_subtask_score(record, path, name) for _, record, path in sources])
        for name in (*PERCEPTION, *COGNITION)
        if name in present
    ]
    totals = [
        (total, [record.number(*path, total, digits=2) for _, record, path in sources])
        for total, subtasks in (("perception", PERCEPTION), ("cognition", COGNITION))
        if present & set(subtasks)
    ]
    return MMETable([name for name, _, _ in sources], rows, totals, list(dict.fromkeys(notes)))


def _mme_sources(records: Sequence[Record]) -> list[tuple[str, Record, tuple[str, ...]]]:
    """The columns: title, record and path of the scores. A base model has one column per set of questions."""
    sources: dict[tuple[str, ...], tuple[str, Record, tuple[str, ...]]] = {}
    for record in records:
        model, questions = record.text("model"), record.text("questions")
        base_key = (model, questions, record.text("images_sha256"))
        sources.setdefault(base_key, (f"{model}, base, {questions} questions", record, (BASE,)))
        if record.mapping(TUNED):
            title = f"{subject_of(record)}, {questions} questions"
            sources[(record.file,)] = (title, record, (TUNED,))
    return list(sources.values())


def _subtask_score(record: Record, path: Sequence[str], name: str) -> Number | None:
    """A subtask's score: the published ones are plain numbers."""
    place = (*path, "subtasks", name)
    return record.number(*place, "score", digits=2) or record.number(*place, digits=2)


@dataclass(frozen=True, slots=True)
class BaseScore:
    """A base model's accuracy on the questions of a collection."""

    model: str
    accuracy: Number
    interval: tuple[Number, Number] | None


def base_scores(collection: Collection, records: Sequence[Record]) -> list[BaseScore]:
    """Base models that were evaluated on the test questions of a collection, each once."""
    scores: dict[str, BaseScore] = {}
    models = {experiment.model for experiment in collection.finished}
    for record in records:
        model = record.text("model")
        is_same = record.get("on") == collection.dataset and record.get("split") == "test" and model in models
        if is_same and model not in scores and _has_same_questions(record, collection):
            path = ("texts", "rougeL") if collection.measure == "ROUGE-L" else ()
            factor = 100 if path else 1
            accuracy = record.number(BASE, *path, "mean" if path else "accuracy", factor=factor)
            if accuracy:
                scores[model] = BaseScore(model, accuracy, record.interval(BASE, *path, "interval", factor=factor))
    return list(scores.values())


def _has_same_questions(record: Record, collection: Collection) -> bool:
    """By the digest of the images, which includes the ids; by the number of questions where none is recorded."""
    results = [experiment.result for experiment in collection.finished if experiment.result]
    digest = record.text("images_sha256")
    digests = {result.text("images_sha256", "test") for result in results}
    if digest and "" not in digests:
        return digest in digests
    return record.get("questions") in {result.get("counts", "test") for result in results}


@dataclass(frozen=True, slots=True)
class RetentionRow:
    """A candidate on one data set."""

    name: str
    on: str
    accuracy: Number | None
    raw: Number | None
    corrected: Number | None
    interval: tuple[Number, Number] | None
    parameters: Number | None
    flops: Number | None
    is_on_front: bool


def is_retention_record(content: Any) -> bool:
    """Whether a JSON value is what `blipfit retain --json` prints."""
    return isinstance(content, Mapping) and isinstance(content.get("candidates"), list) and "at_least" in content


def retention_rows(record: Record) -> list[RetentionRow]:
    """The rows of a retention record, one per candidate and data set."""
    rows = []
    for index, candidate in enumerate(record.get("candidates") or []):
        path = ("candidates", index)
        for dataset in record.mapping(*path, "on"):
            values = (*path, "on", dataset)
            rows.append(
                RetentionRow(
                    record.text(*path, "name"),
                    dataset,
                    record.number(*values, "accuracy"),
                    record.number(*values, "raw", "ratio", factor=100),
                    record.number(*values, "corrected", "ratio", factor=100),
                    record.interval(*values, "corrected", "interval", factor=100),
                    record.number(*path, "shares", "qformer_parameters", factor=100),
                    record.number(*path, "shares", "flops", factor=100),
                    isinstance(candidate, Mapping) and candidate.get("pareto") is True,
                )
            )
    return rows
