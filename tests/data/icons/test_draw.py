"""Pictures: what stands in the scene is what an eye finds, where it stands."""

import itertools

import numpy as np
import pytest
import solver
from PIL import ImageChops, ImageColor

from blipfit.data import icons


def drawn(count, size=64, seed=21, **narrow):
    for index in range(count):
        of = icons.scene(seed, index, **narrow)
        yield of, icons.draw(of, size)


@pytest.mark.parametrize("size", [64, 224])
def test_a_picture_is_rgb_of_the_size_asked(size):
    for plan in icons.PLANS:
        image = icons.draw(icons.scene(1, 1, plan=plan), size)
        assert (image.mode, image.size) == ("RGB", (size, size))


@pytest.mark.parametrize(("size", "count"), [(64, 200), (224, 20)])
def test_an_eye_finds_every_icon_and_nothing_else(size, count):
    cell = size / 4
    for of, image in itertools.islice(((of, image) for of, image in drawn(2 * count, size) if of.icons), count):
        found = {(i.shape, i.color, i.top // cell, i.left // cell, i.bottom - i.top > cell) for i in solver.read(image)}
        assert found == {(i.shape, i.color, i.row, i.col, i.span == 2) for i in of.icons}


def test_an_icon_keeps_within_its_cells():
    for of, image in [pair for pair in drawn(200, plan="few") if pair[0].background == "white"]:
        painted = np.any(np.asarray(image) != ImageColor.getrgb("white"), axis=-1)
        for row in range(4):
            for col in range(4):
                covered = any((row, col) in icon.cells for icon in of.icons)
                assert covered or not painted[16 * row : 16 * row + 16, 16 * col : 16 * col + 16].any()


def test_painting_on_a_picture_leaves_the_next_one_clean():
    for plan in icons.PLANS:
        of = icons.scene(1, 3, plan=plan)
        spoiled = icons.draw(of)
        spoiled.paste("red", (0, 0, 64, 64))
        assert ImageChops.difference(icons.draw(of), spoiled).getbbox() is not None


def test_scenes_of_one_picture_are_drawn_alike_and_others_not():
    bytes_of: dict = {}
    for of, image in drawn(600):
        assert bytes_of.setdefault(of.picture, image.tobytes()) == image.tobytes()
    assert len(set(bytes_of.values())) == len(bytes_of)
