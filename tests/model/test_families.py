"""The family of a language model, read without torch."""

import json

import pytest

from blipfit import grid
from blipfit.model import families, shapes


@pytest.mark.parametrize("name", grid.BLOCKS)
def test_known_models_have_the_family_of_their_configuration(name):
    assert families.read_family(name) == shapes.family(name)


def test_a_folder_has_the_family_of_its_configuration(small, tmp_path):
    for family, folder in small.items():
        assert families.read_family(str(folder)) == family
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"model_type": "opt"}}))
    assert families.read_family(str(tmp_path)) is None


@pytest.mark.parametrize("name", ["", "no such folder", "nobody/nothing", "/", "a/b/c"])
def test_an_unknown_model_has_none(name):
    assert families.read_family(name) is None
