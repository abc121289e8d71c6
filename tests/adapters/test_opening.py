"""The one way to open a model, a run or an adapter folder, and what it refuses."""

import shutil

import pytest

from blipfit import grid
from blipfit.adapters import opening, peft_format
from blipfit.errors import UserError
from blipfit.recipe import ModelConfig
from blipfit.training import loop


@pytest.fixture
def run(small, family, iconqa, tmp_path):
    changes = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=1", "data.images=off"]
    changes += ["training.learning_rate=0.03", "training.max_target_tokens=4"]
    recipe = grid.recipe("iconqa", 31, str(small[family])).override(changes)
    (finished,) = loop.train([recipe], iconqa, tmp_path / "results", device="cpu")
    return finished


def test_a_model_has_no_adapter(small, family):
    model = opening.open_model(small[family], "cpu")
    assert model.source.adapter is None
    assert model.source.recipe is None
    with model.adapter() as backbone:
        assert backbone is model.backbone
        assert backbone.family == family
        assert backbone.experiments == 1


def test_a_run_has_its_adapter_and_recipe(run):
    model = opening.open_model(run.folder, "cpu")
    assert model.source.recipe == run.recipe()
    assert model.source.adapter_sha256 == run.result()["adapter_sha256"]
    bare = model.backbone.hf.query_tokens.clone()
    with model.adapter() as backbone:
        assert not backbone.hf.query_tokens.equal(bare)
    assert model.backbone.hf.query_tokens.equal(bare)


def test_an_adapter_folder_knows_its_base_model(run, small, family):
    source = opening.locate(run.adapter)
    assert (source.model.name, source.recipe) == (str(small[family]), None)
    assert source.adapter_sha256 == run.result()["adapter_sha256"]


def test_the_base_model_can_be_another_copy(run, small, family, tmp_path):
    shutil.copytree(small[family], tmp_path / "copy")
    model = opening.open_model(run.folder, "cpu", base=ModelConfig(name=str(tmp_path / "copy")))
    with model.adapter():
        assert model.backbone.name == str(tmp_path / "copy")


def test_a_model_of_the_other_family_is_refused(run, small, family):
    other = small["vicuna" if family == "t5" else "t5"]
    model = opening.open_model(run.folder, "cpu", base=ModelConfig(name=str(other)))
    with pytest.raises(UserError, match="was not trained on"):
        model.install_adapter()


def test_an_exchanged_adapter_is_refused(run):
    adapter, state = peft_format.read(run.adapter)
    base = peft_format.base(run.adapter)
    peft_format.save(run.adapter, adapter, state | {"query_tokens": state["query_tokens"] + 1e-3}, base)
    with pytest.raises(UserError, match=r"is not the adapter that .*result.json was made with"):
        opening.locate(run.folder)


def test_an_adapter_of_another_base_model_is_refused(run):
    adapter, state = peft_format.read(run.adapter)
    peft_format.save(run.adapter, adapter, state, "another/model")
    with pytest.raises(UserError, match=r"was trained on another/model, but .*recipe.yaml names"):
        opening.locate(run.folder)


def test_an_unfinished_run_is_refused(run):
    run.result_file.unlink()
    with pytest.raises(UserError, match="is not finished; run the same `blipfit train` again"):
        opening.locate(run.folder)


def test_a_folder_without_an_adapter_is_refused_as_one(tmp_path):
    with pytest.raises(UserError, match="is not an adapter folder"):
        opening.locate_adapter(tmp_path)
