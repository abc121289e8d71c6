"""The published numbers."""

import statistics

import pytest

from blipfit import grid
from blipfit.data.mme import SUBTASKS
from blipfit.report import published


@pytest.mark.parametrize(
    ("dataset", "experiment", "value"),
    [
        ("scienceqa", "1", 86.42),
        ("scienceqa", "19", 79.57),
        ("scienceqa", "64", 85.62),
        ("iconqa", "28", 73.31),
        ("iconqa", "41", 73.77),
        ("scienceqa", "baseline", 85.52),
        ("iconqa", "baseline-vicuna", 72.64),
    ],
)
def test_known_values(dataset, experiment, value):
    number = published.accuracy(dataset, experiment)
    assert (number.value, number.digits) == (value, 2)


@pytest.mark.parametrize(
    ("dataset", "experiment"), [("icons", "1"), ("scienceqa", "65"), ("scienceqa", "01"), ("scienceqa", "recover")]
)
def test_what_is_not_published_is_none(dataset, experiment):
    assert published.accuracy(dataset, experiment) is None


def test_the_grid_is_complete():
    for dataset, low, high in (("scienceqa", 79, 89), ("iconqa", 68, 76)):
        values = [published.accuracy(dataset, str(number)).value for number in grid.IDS]
        assert len(values) == 64
        assert low < min(values) < max(values) < high
    rows = [[published.accuracy("scienceqa", str(4 * row + k + 1)).value for k in range(4)] for row in range(16)]
    assert 0.5 < statistics.mean(statistics.stdev(row) for row in rows) < 1.5  # "about ±1 point" in the report


def test_mme_totals_are_the_sums_of_the_subtasks():
    record = published.record()
    scores = record.mapping("mme", "LaVIN", "subtasks")
    assert set(scores) == set(SUBTASKS)
    total = record.get("mme", "LaVIN", "perception") + record.get("mme", "LaVIN", "cognition")
    assert sum(scores.values()) == pytest.approx(total, abs=0.05)  # each is rounded to two decimals
