"""The sizes that a Q-Former can shrink to."""

import itertools

import pytest

from blipfit.compression.qformer_size import Size, reduce_size, resize_config, select_layers
from blipfit.errors import UserError
from blipfit.model import shapes

XL = "Salesforce/instructblip-flan-t5-xl"
XL_SIZE = Size(hidden=768, heads=12, intermediate=3072, layers=12, queries=32, cross_every=2)


def test_size_of_the_published_model():
    assert Size.from_config(shapes.on_meta(XL).config) == XL_SIZE


def test_dimensions_that_are_not_given_stay():
    config = shapes.on_meta(XL).config
    assert reduce_size(config) == XL_SIZE
    assert reduce_size(config, hidden=512, heads=8, layers=None).layers == 12


@pytest.mark.parametrize(
    ("dimensions", "message"),
    [
        (
            {"hidden": 500, "heads": 8},
            "--hidden-size 500 is not divisible by --heads 8; give --heads of 1, 2, 4, 5",
        ),
        ({"hidden": 1024}, "--hidden-size 1024 is larger than the original's 768"),
        ({"heads": 16}, "--heads 16 is larger than the original's 12"),
        ({"queries": 0}, "--queries 0 is too small"),
        ({"layers": -1}, "--layers -1 is too small"),
        ({"hidden": 512, "heads": 4}, "heads of 128 channels are wider than the original's 64; give --heads 8"),
        ({"layers": 8, "cross_every": 1}, "8 layers with cross-attention in every layer cannot be selected from 12"),
    ],
)
def test_impossible_sizes_are_refused_with_a_fix(dimensions, message):
    with pytest.raises(UserError, match=message):
        reduce_size(shapes.on_meta(XL).config, **dimensions)


def test_a_resized_configuration_is_a_copy():
    config = shapes.on_meta(XL).config
    size = reduce_size(config, hidden=512, heads=8, intermediate=1024, layers=8, queries=16, cross_every=4)
    assert Size.from_config(resize_config(config, size)) == size
    assert Size.from_config(config) == XL_SIZE


@pytest.mark.parametrize(("layers", "every", "original_every"), [(3, 2, 2), (4, 1, 2), (5, 3, 2), (2, 2, 1), (6, 2, 2)])
def test_layers_of_the_highest_importance_are_selected(layers, every, original_every):
    """Compared with all possible selections: a layer with cross-attention must inherit from one that has it."""
    original = Size(8, 2, 8, layers=8, queries=4, cross_every=original_every)
    size = Size(8, 2, 8, layers, 4, every)
    layer_importance = [0.3, 2.0, 0.1, 0.5, 1.1, 0.2, 0.9, 0.4]
    cross_importance = [0.7 if layer % original_every == 0 else 0.0 for layer in range(8)]

    def total(selection):
        return sum(
            layer_importance[s] + (cross_importance[s] if position % every == 0 else 0)
            for position, s in enumerate(selection)
        )

    possible = [
        selection
        for selection in itertools.combinations(range(8), layers)
        if all(s % original_every == 0 for position, s in enumerate(selection) if position % every == 0)
    ]
    selection = select_layers(original, size, layer_importance, cross_importance)
    assert selection in possible
    assert total(selection) == pytest.approx(max(map(total, possible)))
