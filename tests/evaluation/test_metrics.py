"""Accuracies, their intervals, and the leaderboard's columns."""

import pytest

from blipfit.data.question import Question
from blipfit.evaluation import metrics


def test_wilson_of_a_worked_example():
    """Newcombe (1998), 81 of 263."""
    assert metrics.wilson(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (5, 10), (1, 3), (1743, 2017)])
def test_wilsons_ends_are_the_proportions_that_are_just_not_rejected(right, total):
    """Its definition: |p̂ − p| = z √(p (1 − p) / n)."""
    low, high = (end / 100 for end in metrics.wilson(right, total))
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= right / total <= high + 1e-9
    for p in (low, high):
        assert abs(right / total - p) == pytest.approx(1.959964 * (p * (1 - p) / total) ** 0.5, abs=1e-7)


def test_nothing_judged_says_nothing():
    assert metrics.accuracy([])["accuracy"] is None
    assert metrics.accuracy([])["interval"] == [0.0, 100.0]


def _asked(subject: str, grade: int, context: str, choices: int = 2, skill: str = "a") -> Question:
    tags = {"subject": subject, "grade": f"grade{grade}", "context": context, "skill": skill}
    return Question("x", None, "?", "a", tuple("abcde"[:choices]), 0, tags=tags)  # type: ignore[arg-type]


QUESTIONS = [
    _asked("natural science", 1, "image"),
    _asked("natural science", 6, "text, image", 3),
    _asked("social science", 7, "image", 3, "b"),
    _asked("language science", 12, "none", 4),
]
RIGHT = [True, False, True, True]


def test_the_leaderboards_columns():
    found = {name: (part["right"], part["questions"]) for name, part in metrics.leaderboard(QUESTIONS, RIGHT).items()}
    assert found == {
        "NAT": (1, 2),
        "SOC": (1, 1),
        "LAN": (1, 1),
        "TXT": (0, 1),
        "IMG": (2, 3),
        "NO": (1, 1),
        "G1-6": (1, 2),
        "G7-12": (2, 2),
    }


def test_breakdowns():
    groups = metrics.breakdown(QUESTIONS, RIGHT)
    assert set(groups) == {"choices", "subject", "skill", "leaderboard"}
    assert {n: part["accuracy"] for n, part in groups["choices"].items()} == {"2": 100.0, "3": 50.0, "4": 100.0}
    assert groups["skill"]["b"]["questions"] == 1
    assert sum(part["questions"] for part in groups["subject"].values()) == 4


def test_other_data_has_no_leaderboard_and_no_table_of_hundreds():
    plain = [Question("x", None, "?", "a", ("a", "b"), 0, tags={"skill": str(n)}) for n in range(40)]  # type: ignore[arg-type]
    assert set(metrics.breakdown(plain, [True] * 40)) == {"choices"}
    one_skill = [Question("x", None, "?", "a", ("a",), 0, tags={"skill": "same"})]  # type: ignore[arg-type]
    assert set(metrics.breakdown(one_skill, [True])) == {"choices"}
