"""Accuracies, their intervals and ScienceQA's leaderboard columns."""

import pytest

from blipfit.data.question import Question
from blipfit.evaluation import metrics


def test_wilson_interval_equals_a_published_example():
    """Newcombe (1998), 81 of 263."""
    assert metrics.wilson_interval(81, 263) == pytest.approx((25.53, 36.62), abs=0.01)


@pytest.mark.parametrize(("right", "total"), [(0, 10), (10, 10), (5, 10), (1, 3), (1743, 2017)])
def test_wilson_interval_satisfies_its_definition(right, total):
    """Its ends are the proportions p with |p̂ − p| = z √(p (1 − p) / n)."""
    low, high = (end / 100 for end in metrics.wilson_interval(right, total))
    assert 0 <= low < high <= 1
    assert low - 1e-9 <= right / total <= high + 1e-9
    for p in (low, high):
        assert abs(right / total - p) == pytest.approx(1.959964 * (p * (1 - p) / total) ** 0.5, abs=1e-7)


def test_no_questions_have_no_accuracy():
    assert metrics.accuracy([])["accuracy"] is None
    assert metrics.accuracy([])["interval"] == [0.0, 100.0]


def _question(subject: str, grade: int, context: str, choices: int = 2, skill: str = "a") -> Question:
    tags = {"subject": subject, "grade": f"grade{grade}", "context": context, "skill": skill}
    return Question("x", None, "?", "a", tuple("abcde"[:choices]), 0, tags=tags)  # type: ignore[arg-type]


QUESTIONS = [
    _question("natural science", 1, "image"),
    _question("natural science", 6, "text, image", 3),
    _question("social science", 7, "image", 3, "b"),
    _question("language science", 12, "none", 4),
]
RIGHT = [True, False, True, True]


def test_the_leaderboard_has_scienceqas_columns():
    columns = metrics.leaderboard_columns(QUESTIONS, RIGHT)
    assert {name: (column["right"], column["questions"]) for name, column in columns.items()} == {
        "NAT": (1, 2),
        "SOC": (1, 1),
        "LAN": (1, 1),
        "TXT": (0, 1),
        "IMG": (2, 3),
        "NO": (1, 1),
        "G1-6": (1, 2),
        "G7-12": (2, 2),
    }


def test_accuracy_is_broken_down_by_choices_subject_and_skill():
    groups = metrics.breakdown(QUESTIONS, RIGHT)
    assert set(groups) == {"choices", "subject", "skill", "leaderboard"}
    assert {n: group["accuracy"] for n, group in groups["choices"].items()} == {"2": 100.0, "3": 50.0, "4": 100.0}
    assert groups["skill"]["b"]["questions"] == 1
    assert sum(group["questions"] for group in groups["subject"].values()) == 4


def test_tags_with_one_or_many_values_give_no_breakdown():
    plain = [Question("x", None, "?", "a", ("a", "b"), 0, tags={"skill": str(n)}) for n in range(40)]  # type: ignore[arg-type]
    assert set(metrics.breakdown(plain, [True] * 40)) == {"choices"}
    one_skill = [Question("x", None, "?", "a", ("a",), 0, tags={"skill": "same"})]  # type: ignore[arg-type]
    assert set(metrics.breakdown(one_skill, [True])) == {"choices"}
