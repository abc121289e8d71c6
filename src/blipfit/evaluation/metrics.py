"""Accuracy with its confidence interval, over all questions and by groups of questions."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from blipfit.data.question import Question

_GRADES = {"G1-6": range(1, 7), "G7-12": range(7, 13)}
_MAX_GROUPS = 20  # ScienceQA has hundreds of skills: a table of them would be of no use
_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}


def wilson_interval(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Return the 95 % confidence interval of `right` out of `total`, in percent.

    This is Wilson's score interval, which stays valid near 0 and 100 %. With `total` 0 it is (0, 100).
    """
    if total == 0:
        return (0.0, 100.0)
    p, spread = right / total, z * z / total
    center = (p + spread / 2) / (1 + spread)
    half_width = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return (100 * max(0.0, center - half_width), 100 * min(1.0, center + half_width))


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Return accuracy in percent with its 95 % interval and counts; without questions the accuracy is None."""
    right, total = sum(correct), len(correct)
    low, high = wilson_interval(right, total)
    return {
        "accuracy": round(100 * right / total, 4) if total else None,
        "interval": [round(low, 4), round(high, 4)],
        "right": right,
        "questions": total,
    }


def breakdown(questions: Sequence[Question], correct: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """Return the accuracy by groups: group name → value → accuracy.

    The groups are the number of choices, `subject` and `skill` if they have 2 to 20 different values, and ScienceQA's
    leaderboard columns if the questions have its tags.
    """
    groups: dict[str, dict[str, Any]] = {
        "choices": _accuracy_by(questions, correct, lambda question: str(len(question.choices))),
    }
    for tag in ("subject", "skill"):
        values = {q.tags[tag] for q in questions if tag in q.tags}
        if 1 < len(values) <= _MAX_GROUPS:
            groups[tag] = _accuracy_by(questions, correct, lambda question, tag=tag: question.tags.get(tag))  # type: ignore[misc]
    if columns := leaderboard_columns(questions, correct):
        groups["leaderboard"] = columns
    return groups


def leaderboard_columns(questions: Sequence[Question], correct: Sequence[bool]) -> dict[str, Any]:
    """Return the accuracies of ScienceQA's leaderboard: subject (NAT, SOC, LAN), context (TXT, IMG, NO), grade.

    A question counts for TXT if it has a hint and for IMG if it has an image, so these columns overlap. Columns without
    questions are left out; the result is empty if a question lacks one of the tags.
    """
    if not all({"subject", "grade", "context"} <= q.tags.keys() for q in questions):
        return {}
    column_filters: dict[str, Callable[[Mapping[str, str]], bool]] = {
        **{column: (lambda tags, s=subject: tags["subject"] == s) for column, subject in _SUBJECTS.items()},  # type: ignore[misc]
        "TXT": lambda tags: "text" in tags["context"],
        "IMG": lambda tags: "image" in tags["context"],
        "NO": lambda tags: tags["context"] == "none",
        **{
            column: (lambda tags, g=grades: int(tags["grade"].removeprefix("grade")) in g)  # type: ignore[misc]
            for column, grades in _GRADES.items()
        },
    }
    columns = {}
    for column, matches in column_filters.items():
        if group := [right for q, right in zip(questions, correct, strict=True) if matches(q.tags)]:
            columns[column] = accuracy(group)
    return columns


def _accuracy_by(
    questions: Iterable[Question], correct: Iterable[bool], key: Callable[[Question], str | None]
) -> dict[str, Any]:
    groups: dict[str, list[bool]] = {}
    for question, right in zip(questions, correct, strict=True):
        if (value := key(question)) is not None:
            groups.setdefault(value, []).append(right)
    return {value: accuracy(groups[value]) for value in sorted(groups)}
