"""A finished run: what a kill left in it goes, an exchanged adapter is noticed, and the space it took was foreseen."""

import shutil
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from blipfit import data, disk_space, run_folder
from blipfit.adapters import open_model, peft_format
from blipfit.commands import cost
from blipfit.data import feature_store
from blipfit.errors import UserError
from blipfit.evaluation.disk_needs import prediction_bytes
from blipfit.model.cost import Lengths
from blipfit.model.image_features import ImageFeatures
from blipfit.run_folder import Run
from blipfit.training import disk_needs, events, loop
from leftovers import leave_temporary_folder

pytestmark = pytest.mark.parametrize("family", ["t5"], indirect=True)  # none of this depends on the language model


def _train_again(run: Run, folder: Path) -> events.RunSkipped:
    """The event of the same training, which must skip the run."""
    results, seen = run.folder.parents[1], []
    loop.train([run.recipe()], folder, results, device="cpu", listener=seen.append)
    (event,) = seen
    assert isinstance(event, events.RunSkipped)
    return event


def test_what_a_kill_left_in_a_finished_run_goes(finished_run: Run, iconqa: Path):
    files = sorted(finished_run.folder.rglob("*"))
    assert not finished_run.checkpoint.exists()

    def leave_traces() -> None:
        run_folder.write_text(finished_run.checkpoint / "state-000001.safetensors", "state")
        leave_temporary_folder(finished_run.result_file)
        leave_temporary_folder(finished_run.checkpoint / "state-000002.safetensors")

    leave_traces()
    assert _train_again(finished_run, iconqa).warning is None
    assert sorted(finished_run.folder.rglob("*")) == files
    leave_traces()
    open_model.locate_adapter(finished_run.folder)
    assert sorted(finished_run.folder.rglob("*")) == files


def test_an_exchanged_or_missing_adapter_is_noticed(finished_run: Run, iconqa: Path):
    file = finished_run.adapter / peft_format.TRAINED_FILE
    with safe_open(file, "pt") as saved:
        header = saved.metadata()
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file, header)
    for problem in ("is not the adapter that .*result.json was made with", "is missing"):
        with pytest.raises(UserError, match=problem):
            cost.run(str(finished_run.folder), None, None, Lengths())
        warning = _train_again(finished_run, iconqa).warning
        assert warning is not None
        assert "copy the run folder again, or delete it and train again" in warning
        shutil.rmtree(finished_run.adapter, ignore_errors=True)


def test_the_space_of_a_run_is_estimated(finished_run: Run, iconqa: Path):
    recipe = finished_run.recipe()
    values = disk_needs._count_values([recipe])[recipe.title]
    assert values == finished_run.result()["trained_parameters"]
    predictions = prediction_bytes(disk_needs._load_evaluated(recipe.data, iconqa))
    assert 0.3 * predictions < finished_run.predictions_file.stat().st_size <= predictions
    used = disk_space.folder_bytes(finished_run.folder)
    assert values * 4 < used <= disk_needs._result_bytes(values) + predictions
    results, folders = finished_run.folder.parents[1], {"iconqa": iconqa}
    disk_needs.require_space([], folders, results)
    disk_needs.require_space([[recipe], [recipe]], folders, results)


def test_checkpoints_of_one_bank_at_a_time_count(finished_run: Run, iconqa: Path, monkeypatch: pytest.MonkeyPatch):
    recipe, needs = finished_run.recipe(), []
    monkeypatch.setattr(disk_space, "require_space", lambda folder, needed, contents: needs.append((needed, contents)))
    results, folders = finished_run.folder.parents[1], {"iconqa": iconqa}
    for banks in ([[recipe]], [[recipe], [recipe]], [[recipe, recipe]]):
        disk_needs.require_space(banks, folders, results)
    (single, _), (in_turn, _), (together, contents) = needs
    assert single < in_turn < together
    assert together == 2 * single
    assert contents == "checkpoints and results of 2 experiments"


def test_missing_features_are_refused_with_the_checkpoints(
    backbone, iconqa: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = ImageFeatures.from_backbone(backbone, "stored", tmp_path)
    questions = data.load("iconqa", iconqa, "test")

    class Split:
        def __init__(self) -> None:
            self.questions = questions

    splits = [Split(), Split()]
    disk_needs.require_feature_space([source, source], splits, [])
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 100)
    with pytest.raises(UserError, match=rf"image features of {len(questions)} images .* has only 100 bytes left"):
        disk_needs.require_feature_space([source, source], splits, [])
    monkeypatch.undo()
    source.prepare(questions)
    monkeypatch.setattr(disk_space, "free_bytes", lambda path: 100)
    disk_needs.require_feature_space([source, source], splits, [])
    assert feature_store.list_shards(source.store.home)
