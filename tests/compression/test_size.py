"""Which sizes a Q-Former can shrink to."""

import itertools

import pytest

from blipfit.compression import size as shrink_size
from blipfit.compression.size import Size
from blipfit.errors import UserError
from blipfit.model import shapes

XL = "Salesforce/instructblip-flan-t5-xl"
THERE = Size(hidden=768, heads=12, intermediate=3072, layers=12, queries=32, cross_every=2)


def test_size_of_the_published_model():
    assert shrink_size.of(shapes.on_meta(XL).config) == THERE


def test_what_is_not_given_stays():
    config = shapes.on_meta(XL).config
    assert shrink_size.wanted(config) == THERE
    assert shrink_size.wanted(config, hidden=512, heads=8, layers=None).layers == 12


@pytest.mark.parametrize(
    ("sizes", "sentence"),
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
        ({"layers": 8, "cross_every": 1}, "8 layers with cross-attention in every layer cannot be chosen from 12"),
    ],
)
def test_impossible_sizes_are_told_with_the_mend(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        shrink_size.wanted(shapes.on_meta(XL).config, **sizes)


def test_the_configuration_of_a_size_is_a_copy():
    config = shapes.on_meta(XL).config
    size = shrink_size.wanted(config, hidden=512, heads=8, intermediate=1024, layers=8, queries=16, cross_every=4)
    assert shrink_size.of(shrink_size.configured(config, size)) == size
    assert shrink_size.of(config) == THERE


@pytest.mark.parametrize(("layers", "every", "there_every"), [(3, 2, 2), (4, 1, 2), (5, 3, 2), (2, 2, 1), (6, 2, 2)])
def test_layers_of_the_highest_worth_are_kept(layers, every, there_every):
    """Against trying every choice: a layer with cross-attention must come from one."""
    there = Size(8, 2, 8, layers=8, queries=4, cross_every=there_every)
    size = Size(8, 2, 8, layers, 4, every)
    main = [0.3, 2.0, 0.1, 0.5, 1.1, 0.2, 0.9, 0.4]
    cross = [0.7 if layer % there_every == 0 else 0.0 for layer in range(8)]

    def worth(chosen):
        return sum(main[s] + (cross[s] if place % every == 0 else 0) for place, s in enumerate(chosen))

    possible = [
        chosen
        for chosen in itertools.combinations(range(8), layers)
        if all(s % there_every == 0 for place, s in enumerate(chosen) if place % every == 0)
    ]
    found = shrink_size.sources(there, size, main, cross)
    assert found in possible
    assert worth(found) == pytest.approx(max(map(worth, possible)))
