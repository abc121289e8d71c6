"""Accuracies with their uncertainty, and broken down as leaderboards print them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from blipfit.data.question import Question

_GRADES = {"G1-6": range(1, 7), "G7-12": range(7, 13)}
_MOST_VALUES = 20  # ScienceQA has hundreds of skills: a table of them tells nobody anything
_SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}


def wilson(right: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """95 % interval of a proportion in percent (Wilson's score interval, honest near 0 and 100 %)."""
    if total == 0:
        return (0.0, 100.0)
    p, spread = right / total, z * z / total
    centre = (p + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(p * (1 - p) / total + spread / (4 * total))
    return (100 * max(0.0, centre - half), 100 * min(1.0, centre + half))


def accuracy(correct: Sequence[bool]) -> dict[str, Any]:
    """Accuracy in percent with interval and counts."""
    right, total = sum(correct), len(correct)
    low, high = wilson(right, total)
    return {
        "accuracy": round(100 * right / total, 4) if total else None,
        "interval": [round(low, 4), round(high, 4)],
        "right": right,
        "questions": total,
    }


def breakdown(questions: Sequence[Question], correct: Sequence[bool]) -> dict[str, dict[str, Any]]:
    """Accuracy by number of choices, by every tag with few values, and ScienceQA's leaderboard columns."""
    groups: dict[str, dict[str, Any]] = {
        "choices": _by(questions, correct, lambda q: str(len(q.choices))),
    }
    for tag in ("subject", "skill"):
        values = {q.tags[tag] for q in questions if tag in q.tags}
        if 1 < len(values) <= _MOST_VALUES:
            groups[tag] = _by(questions, correct, lambda q, tag=tag: q.tags.get(tag))  # type: ignore[misc]
    if columns := leaderboard(questions, correct):
        groups["leaderboard"] = columns
    return groups


def leaderboard(questions: Sequence[Question], correct: Sequence[bool]) -> dict[str, Any]:
    """ScienceQA's columns: subject (NAT, SOC, LAN), context (TXT, IMG, NO), grade (G1-6, G7-12).

    A question counts for TXT when it has a hint and for IMG when it has an image, so the columns overlap. Empty
    where the questions carry no such tags.
    """
    if not all({"subject", "grade", "context"} <= q.tags.keys() for q in questions):
        return {}
    tests: dict[str, Callable[[Mapping[str, str]], bool]] = {
        **{column: (lambda t, s=subject: t["subject"] == s) for column, subject in _SUBJECTS.items()},  # type: ignore[misc]
        "TXT": lambda t: "text" in t["context"],
        "IMG": lambda t: "image" in t["context"],
        "NO": lambda t: t["context"] == "none",
        **{
            column: (lambda t, g=grades: int(t["grade"].removeprefix("grade")) in g)  # type: ignore[misc]
            for column, grades in _GRADES.items()
        },
    }
    columns = {}
    for column, test in tests.items():
        if chosen := [right for q, right in zip(questions, correct, strict=True) if test(q.tags)]:
            columns[column] = accuracy(chosen)
    return columns


def _by(
    questions: Iterable[Question], correct: Iterable[bool], key: Callable[[Question], str | None]
) -> dict[str, Any]:
    groups: dict[str, list[bool]] = {}
    for question, right in zip(questions, correct, strict=True):
        if (value := key(question)) is not None:
            groups.setdefault(value, []).append(right)
    return {value: accuracy(groups[value]) for value in sorted(groups)}
