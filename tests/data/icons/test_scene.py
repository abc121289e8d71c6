"""Scenes: one fixed endless series, uniform sampling, no overlapping icons."""

import os
import subprocess
import sys
from collections import Counter

import pytest

from blipfit.data import icons

# When this digest changes, increase write.VERSION: prepared folders and trained models depend on the series.
SERIES_DIGEST = "96fbc97c06c583bf825db678fc89ba203e9b64c30c5f63843afa32fc913c2093"
DIGEST_SCRIPT = """
import hashlib
from dataclasses import astuple
from blipfit.data import icons
digest = hashlib.sha256()
for index in range(400):
    scene = icons.make_scene(3, index)
    records = [scene, *icons.make_questions(scene), *icons.make_yes_no_pairs(scene)]
    if preference := icons.make_preference(scene):
        records.append(preference)
    digest.update(repr((list(map(astuple, records)), icons.make_captions(scene))).encode())
print(digest.hexdigest())
"""


def deviation_from_uniform(counts: Counter, values: int) -> float:
    """Chi-square statistic of the counts of `values` values, in standard deviations from its mean."""
    total = sum(counts.values())
    missing = (values - len(counts)) * total / values
    square = sum((count - total / values) ** 2 for count in counts.values()) * values / total + missing
    return (square - (values - 1)) / (2 * (values - 1)) ** 0.5


@pytest.mark.parametrize("hash_seed", ["0", "1"])
def test_every_process_makes_the_same_series(hash_seed):
    process = subprocess.run(
        [sys.executable, "-c", DIGEST_SCRIPT],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == SERIES_DIGEST


def test_a_scene_does_not_depend_on_those_before_it():
    scene = icons.make_scene(5, 99)
    for index in range(10):
        icons.make_scene(5, index)
    assert icons.make_scene(5, 99) == scene
    assert icons.make_scene(6, 99) != scene
    assert icons.make_scene(5, 98) != scene


@pytest.mark.parametrize("plan", icons.PLANS)
def test_a_series_rarely_repeats_a_picture(plan):
    keys = {icons.make_scene(1, index, plan=plan).picture_key for index in range(1000)}
    assert len(keys) > (700 if plan == "total" else 850)  # a single icon has few possible positions


def test_icons_stay_on_the_board_and_do_not_overlap():
    for index in range(1500):
        scene = icons.make_scene(2, index)
        cells = [cell for icon in scene.icons for cell in icon.cells]
        assert len(cells) == len(set(cells))
        assert all(0 <= coordinate < 4 for cell in cells for coordinate in cell)
        assert bool(scene.icons) == (scene.value is None)


def test_a_plan_or_a_kind_restricts_the_scenes():
    for name, plan in icons.PLANS.items():
        scene = icons.make_scene(1, 7, plan=name)
        assert (scene.plan, scene.kind) == (name, plan.kind)
    for kind in icons.KINDS:
        assert {icons.make_scene(1, index, kind=kind).kind for index in range(20)} == {kind}
    assert {icons.make_scene(1, index).plan for index in range(300)} == set(icons.PLANS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="unknown scene kind 'circus'; expected one of scatter, "):
        icons.make_scene(1, 1, kind="circus")
    with pytest.raises(ValueError, match="unknown scene plan 'plot'; expected one of total, "):
        icons.make_scene(1, 1, plan="plot")


@pytest.mark.parametrize(
    ("plan", "get_answer", "values"),
    [
        ("total", lambda scene: len(scene.icons), 6),
        ("scale", lambda scene: scene.value, 11),
        ("clock", lambda scene: scene.value, 24),
        ("few", lambda scene: scene.icons[0].shape, 8),
        ("few", lambda scene: scene.icons[0].color, 7),
    ],
)
def test_answers_are_sampled_uniformly(plan, get_answer, values):
    counts = Counter(get_answer(icons.make_scene(4, index, plan=plan)) for index in range(3000))
    assert deviation_from_uniform(counts, values) < 4


def test_each_name_of_a_comparison_is_the_more_frequent_one_half_of_the_time():
    first_wins = 0
    for index in range(2000):
        scene = icons.make_scene(8, index, plan="pair")
        names = [name for icon in scene.icons for name in (icon.shape, icon.color)]
        first, second = (names.count(name) for name in scene.focus)
        assert first != second
        first_wins += first > second
    assert abs(first_wins - 1000) < 100
