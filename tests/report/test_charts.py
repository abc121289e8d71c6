"""Axes: positions and ticks."""

import pytest

from blipfit.report import charts


@pytest.mark.parametrize(
    ("low", "high", "log"),
    [(0, 1, False), (52.3, 88.1, False), (5, 5, False), (0, 0, False), (2e4, 2e8, True), (3.7e6, 3.7e6, True)],
)
def test_an_axis_covers_its_values_with_ticks_inside(low, high, log):
    axis = charts.x_axis("x", [low, high], log=log)
    positions = [axis.position(value) for value in (low, high)]
    assert axis.start < positions[0] <= positions[1] < axis.end
    ticks = axis.ticks
    assert 2 <= len(ticks) <= 13
    assert all(axis.start <= tick.position <= axis.end for tick in ticks)
    assert len({tick.label for tick in ticks}) == len(ticks)


def test_a_logarithmic_axis_gives_equal_ratios_equal_distances():
    axis = charts.x_axis("x", [1e4, 1e8], log=True)
    first, second, third = (axis.position(value) for value in (1e5, 1e6, 1e7))
    assert second - first == pytest.approx(third - second, abs=0.02)
    assert [tick.label for tick in axis.ticks] == ["10 k", "100 k", "1 M", "10 M", "100 M"]


def test_epochs_are_whole_numbers():
    assert [tick.label for tick in charts.x_axis("epoch", [1, 3], whole=True).ticks] == ["1", "2", "3"]
    assert [tick.label for tick in charts.x_axis("epoch", [1, 1], whole=True).ticks] == ["1"]


def test_the_vertical_axis_points_upwards():
    axis = charts.y_axis("%", [40, 90])
    assert axis.position(40) > axis.position(90)
