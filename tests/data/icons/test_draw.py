"""Pictures show what is in the scene, at the right position."""

import itertools

import numpy as np
import pytest
import solver
from PIL import ImageChops, ImageColor

from blipfit.data import icons


def draw_scenes(count, size=64, seed=21, **restrictions):
    for index in range(count):
        scene = icons.make_scene(seed, index, **restrictions)
        yield scene, icons.draw(scene, size)


@pytest.mark.parametrize("size", [64, 224])
def test_a_picture_is_rgb_and_has_the_requested_size(size):
    for plan in icons.PLANS:
        image = icons.draw(icons.make_scene(1, 1, plan=plan), size)
        assert (image.mode, image.size) == ("RGB", (size, size))


@pytest.mark.parametrize(("size", "count"), [(64, 200), (224, 20)])
def test_the_solver_detects_every_icon_and_nothing_else(size, count):
    cell = size / 4
    pairs = ((scene, image) for scene, image in draw_scenes(2 * count, size) if scene.icons)
    for scene, image in itertools.islice(pairs, count):
        detections = {(i.shape, i.color, i.top // cell, i.left // cell, i.height > cell) for i in solver.detect(image)}
        assert detections == {(i.shape, i.color, i.row, i.col, i.span == 2) for i in scene.icons}


def test_an_icon_stays_inside_its_cells():
    for scene, image in [pair for pair in draw_scenes(200, plan="few") if pair[0].background == "white"]:
        painted = np.any(np.asarray(image) != ImageColor.getrgb("white"), axis=-1)
        for row in range(4):
            for col in range(4):
                covered = any((row, col) in icon.cells for icon in scene.icons)
                assert covered or not painted[16 * row : 16 * row + 16, 16 * col : 16 * col + 16].any()


def test_painting_on_a_picture_does_not_change_the_next_one():
    for plan in icons.PLANS:
        scene = icons.make_scene(1, 3, plan=plan)
        image = icons.draw(scene)
        image.paste("red", (0, 0, 64, 64))
        assert ImageChops.difference(icons.draw(scene), image).getbbox() is not None


def test_scenes_have_the_same_picture_exactly_if_their_picture_keys_are_equal():
    pictures: dict = {}
    for scene, image in draw_scenes(600):
        assert pictures.setdefault(scene.picture_key, image.tobytes()) == image.tobytes()
    assert len(set(pictures.values())) == len(pictures)
