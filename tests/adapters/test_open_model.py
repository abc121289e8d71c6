"""The one way to open a model, a run or an adapter folder, and what it refuses."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blipfit import grid, inference, sweep
from blipfit.adapters import open_model, peft_format
from blipfit.commands import cost, evaluate
from blipfit.errors import UserError
from blipfit.model.cost import Lengths
from blipfit.recipe import ModelConfig
from blipfit.training import loop
from blipfit.training.model_cache import ModelCache


@pytest.fixture
def run(finished_run):
    return finished_run


def test_a_model_has_no_adapter(small, family):
    model = open_model.open_model(small[family], "cpu")
    assert model.source.adapter is None
    assert model.source.recipe is None
    with model.adapter() as backbone:
        assert backbone is model.backbone
        assert backbone.family == family
        assert backbone.experiments == 1


def test_a_run_has_its_adapter_and_recipe(run):
    model = open_model.open_model(run.folder, "cpu")
    assert model.source.recipe == run.recipe()
    assert model.source.adapter_sha256 == run.result()["adapter_sha256"]
    bare = model.backbone.hf.query_tokens.clone()
    with model.adapter() as backbone:
        assert not backbone.hf.query_tokens.equal(bare)
    assert model.backbone.hf.query_tokens.equal(bare)


def test_an_adapter_folder_knows_its_base_model(run, small, family):
    source = open_model.locate_model(run.adapter)
    assert (source.model.name, source.recipe) == (str(small[family]), None)
    assert source.adapter_sha256 == run.result()["adapter_sha256"]


def test_the_base_model_can_be_another_copy(run, small, family, tmp_path):
    shutil.copytree(small[family], tmp_path / "copy")
    model = open_model.open_model(run.folder, "cpu", base=ModelConfig(name=str(tmp_path / "copy")))
    with model.adapter():
        assert model.backbone.name == str(tmp_path / "copy")


def test_a_model_of_the_other_family_is_refused(run, small, family):
    other = small["vicuna" if family == "t5" else "t5"]
    with pytest.raises(UserError, match="has a language model of another family"):
        open_model.open_model(run.folder, "cpu", base=ModelConfig(name=str(other)))


def test_an_exchanged_adapter_is_refused(run):
    adapter, state = peft_format.read(run.adapter)
    base = peft_format.read_saved(run.adapter).base.name
    peft_format.save(run.adapter, adapter, state | {"query_tokens": state["query_tokens"] + 1e-3}, base)
    with pytest.raises(UserError, match=r"is not the adapter that .*result.json was made with"):
        open_model.locate_model(run.folder)


def test_an_adapter_of_another_base_model_is_refused(run):
    adapter, state = peft_format.read(run.adapter)
    peft_format.save(run.adapter, adapter, state, "another/model")
    with pytest.raises(UserError, match=r"was trained on another/model, but .*recipe.yaml names"):
        open_model.locate_model(run.folder)


def test_an_unfinished_run_is_refused(run):
    run.result_file.unlink()
    with pytest.raises(UserError, match="is not finished; run the same `blipfit train` again"):
        open_model.locate_model(run.folder)


def test_a_folder_without_an_adapter_is_refused_as_one(tmp_path):
    with pytest.raises(UserError, match="is not an adapter folder"):
        open_model.locate_adapter(tmp_path)


def change_weights(folder):
    """Exchange the weights under the same name, as another revision of a hub branch does."""
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.lm_head.weight"][0, 0] += 1
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture
def train_beside(small, family, tmp_path, monkeypatch):
    """Train with the folder `base` of the working folder as the model, which a test may then change or move."""
    shutil.copytree(small[family], tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    changes = ["training.batch_size=2", "training.accumulation=1", "training.max_epochs=1", "data.images=off"]
    recipe = grid.recipe("iconqa", 31, "base").override(
        [*changes, "training.learning_rate=0.03", "training.max_target_tokens=4"]
    )
    return lambda data: loop.train([recipe], data, tmp_path / "results", device="cpu")[0]


def test_a_base_with_other_weights_is_refused(train_beside, iconqa, tmp_path):
    run = train_beside(iconqa)
    assert run.result()["base_sha256"] == open_model.locate_model(run.folder).trained_on.sha256
    assert run.result()["base_folder"] == str(tmp_path / "base")
    change_weights(tmp_path / "base")
    for folder in (run.folder, run.adapter):
        with pytest.raises(UserError, match=r"was trained on other weights of its base model.*--model base"):
            open_model.locate_model(folder)
    with pytest.raises(UserError, match="with other weights of base than it has now"):
        train_beside(iconqa)
    with pytest.raises(UserError, match="with other weights of base than it has now"):
        sweep.make_plan([run.recipe()], {"iconqa": iconqa}, tmp_path / "results", ModelCache("cpu"), 1)
    with pytest.raises(UserError, match="other weights"):
        evaluate.run(run.folder, iconqa, "test", "cpu")


def test_a_given_base_with_other_weights_is_a_warning_in_the_record(train_beside, iconqa, tmp_path, capsys):
    run = train_beside(iconqa)
    recorded = run.result()["metrics"]["test"]["accuracy"]
    assert evaluate.run(run.folder, iconqa, "test", "cpu", model_name="base")["tuned"]["accuracy"] == recorded
    assert capsys.readouterr().err == ""
    change_weights(tmp_path / "base")
    record = evaluate.run(run.folder, iconqa, "test", "cpu", model_name="base")
    assert "was not trained on base" in record["warnings"][0]
    assert "was not trained on base" in capsys.readouterr().err
    sentences = []
    model = inference.load("base", run.folder, device="cpu", announce=sentences.append)
    assert list(model.warnings) == sentences
    assert "was not trained on base" in sentences[0]
    lengths = Lengths(8, 8, 2, 2)
    assert "was not trained on base" in cost.run(str(run.folder), None, "base", lengths)["warnings"][0]
    with pytest.raises(UserError, match="other weights"):
        cost.run(str(run.folder), None, None, lengths, torch.device("cpu"))


def test_a_relative_base_is_found_from_another_folder(train_beside, iconqa, tmp_path, monkeypatch):
    run = train_beside(iconqa)
    assert open_model.locate_model(run.folder).model.name == "base"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert open_model.locate_model(run.folder).model.name == str(tmp_path / "base")
    assert open_model.locate_model(run.adapter).model.name == str(tmp_path / "base")


def test_a_moved_base_is_one_sentence_and_can_be_given(train_beside, iconqa, tmp_path):
    run = train_beside(iconqa)
    (tmp_path / "base").rename(tmp_path / "other")
    for folder, name in ((run.folder, "recipe.yaml"), (run.adapter, "adapter")):
        with pytest.raises(UserError, match=rf"the base model base of .*{name} is not at .*--model"):
            open_model.locate_model(folder)
    source = open_model.locate_model(run.folder, ModelConfig(name=str(tmp_path / "other")))
    assert source.warnings == ()
    assert source.recipe == run.recipe()


def test_a_run_of_an_older_version_opens_without_a_digest(run, small, family, iconqa):
    adapter, state = peft_format.read(run.adapter)
    peft_format.save(run.adapter, adapter, state, str(small[family]))
    result = run.result()
    del result["base_sha256"], result["base_folder"]
    run.result_file.write_text(json.dumps(result))
    source = open_model.locate_model(run.folder)
    assert (source.trained_on.sha256, source.warnings) == (None, ())
    assert evaluate.run(run.folder, iconqa, "test", "cpu")["tuned"]["accuracy"] == result["metrics"]["test"]["accuracy"]


@pytest.mark.parametrize("text", ["[]", "null", "3", "{}", '{"metrics": {}}', '{"metrics": [], "adapter_sha256": "x"}'])
def test_a_damaged_result_is_one_sentence(run, text):
    run.result_file.write_text(text)
    with pytest.raises(UserError, match=r"result\.json is damaged"):
        open_model.locate_model(run.folder)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("file", [peft_format.TRAINED_FILE, peft_format.LORA_FILE])
def test_an_adapter_that_is_not_finite_is_refused(run, file, value):
    path = run.adapter / file
    with safe_open(path, "pt") as opened:
        header = opened.metadata()
    tensors = load_file(path)
    tensors[max(tensors)].view(-1)[0] = value
    save_file(tensors, path, header)
    with pytest.raises(UserError, match=r"the tensor \S+ is not finite"):
        open_model.locate_model(run.folder)
