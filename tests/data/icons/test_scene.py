"""Scenes: one fixed endless series, fair lots, nothing on top of anything."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from blipfit.data import icons

# Raise write.VERSION with this digest: prepared folders and trained files refer to the series.
SERIES = "275366dfcaec417492f2a8135ae55895eac0d7e9ce300c8acd2ce25ceb468aed"
DIGEST = """
import hashlib
from blipfit.data import icons
told = hashlib.sha256()
for index in range(400):
    scene = icons.scene(3, index)
    told.update(repr((scene, icons.questions(scene), icons.captions(scene))).encode())
    told.update(repr((icons.yes_no(scene), icons.preference(scene))).encode())
print(told.hexdigest())
"""


def uneven(counts: Counter, cells: int) -> float:
    """Chi-square of counts against equal shares, in standard deviations from its mean."""
    total = sum(counts.values())
    missing = (cells - len(counts)) * total / cells
    square = sum((seen - total / cells) ** 2 for seen in counts.values()) * cells / total + missing
    return (square - (cells - 1)) / (2 * (cells - 1)) ** 0.5


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_every_process_sees_the_same_series(hash_seed):
    done = subprocess.run(
        [sys.executable, "-c", DIGEST],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == SERIES


def test_a_scene_does_not_depend_on_those_before_it():
    late = icons.scene(5, 99)
    for index in range(10):
        icons.scene(5, index)
    assert icons.scene(5, 99) == late
    assert icons.scene(6, 99) != late
    assert icons.scene(5, 98) != late


@pytest.mark.parametrize("plan", icons.PLANS)
def test_a_series_rarely_repeats_a_picture(plan):
    pictures = {icons.scene(1, index, plan=plan).picture for index in range(1000)}
    assert len(pictures) > (700 if plan == "total" else 850)  # one icon alone has few places


def test_icons_stay_on_the_board_and_apart():
    for index in range(1500):
        of = icons.scene(2, index)
        cells = [cell for icon in of.icons for cell in icon.cells]
        assert len(cells) == len(set(cells))
        assert all(0 <= at < 4 for cell in cells for at in cell)
        assert bool(of.icons) == (of.value is None)


def test_plans_and_kinds_narrow_the_draw():
    for plan, (kind, _, _) in icons.PLANS.items():
        of = icons.scene(1, 7, plan=plan)
        assert (of.plan, of.kind) == (plan, kind)
    for kind in icons.KINDS:
        assert {icons.scene(1, index, kind=kind).kind for index in range(20)} == {kind}
    assert {icons.scene(1, index).plan for index in range(300)} == set(icons.PLANS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="no kind of scene 'circus'"):
        icons.scene(1, 1, kind="circus")
    with pytest.raises(ValueError, match="no plan 'plot'"):
        icons.scene(1, 1, plan="plot")


@pytest.mark.parametrize(
    ("plan", "fixed", "cells"),
    [
        ("total", lambda of: len(of.icons), 6),
        ("scale", lambda of: of.value, 11),
        ("clock", lambda of: of.value, 24),
        ("few", lambda of: of.icons[0].shape, 8),
        ("few", lambda of: of.icons[0].color, 7),
    ],
)
def test_what_is_asked_is_drawn_evenly(plan, fixed, cells):
    counts = Counter(fixed(icons.scene(4, index, plan=plan)) for index in range(3000))
    assert uneven(counts, cells) < 4


def test_the_two_sides_of_a_comparison_are_alike():
    first_wins = 0
    for index in range(2000):
        of = icons.scene(8, index, plan="pair")
        seen = [name for icon in of.icons for name in (icon.shape, icon.color)]
        first, second = (seen.count(name) for name in of.focus)
        assert first != second
        first_wins += first > second
    assert abs(first_wins - 1000) < 100
