"""The run folder: whole files or none, claimed by one recipe."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from blipfit import grid, run_folder
from blipfit.errors import UserError
from blipfit.run_folder import Inputs, Run
from leftovers import leave_temporary_folder

RECIPE = grid.recipe("scienceqa", 15, "tiny")


def test_its_place_and_states(tmp_path: Path):
    mine = Run.of(tmp_path, RECIPE)
    assert mine.folder == tmp_path / "scienceqa" / "15"
    assert mine.state() == "new"
    assert mine.claim(RECIPE, Inputs("questions")) == "new"
    assert mine.recipe() == RECIPE
    assert mine.claim(RECIPE, Inputs("questions")) == mine.state() == "new", "nothing to continue yet"
    run_folder.write_text(mine.checkpoint / "state.safetensors", "state")
    assert mine.claim(RECIPE, Inputs("questions")) == mine.state() == "started"
    assert mine.failure() == "not finished"
    assert run_folder.find(tmp_path) == []
    result = {"metrics": {}, "adapter_sha256": "0"}
    run_folder.write_json(mine.result_file, result)
    assert mine.claim(RECIPE, Inputs("questions")) == mine.state() == "finished"
    assert mine.result() == result
    assert run_folder.find(tmp_path) == [mine]


def test_another_recipe_is_refused_with_what_differs(tmp_path: Path):
    mine = Run.of(tmp_path, RECIPE)
    other = RECIPE.override(["training.seed=7"])
    mine.claim(other, Inputs("questions"))
    mine.claim(RECIPE, Inputs("questions"))
    assert mine.recipe() == RECIPE, "a folder in which nothing was trained is free"
    run_folder.write_text(mine.checkpoint / "state.safetensors", "state")
    before = mine.recipe_file.read_bytes()
    with pytest.raises(UserError, match=r"holds an unfinished run on other questions than --data has now"):
        mine.claim(RECIPE, Inputs("other questions"))
    run_folder.write_json(mine.result_file, {})
    with pytest.raises(UserError, match=r"training.seed is 42 there and 7 here.*another --results folder"):
        mine.claim(RECIPE.override(["training.seed=7"]), Inputs("questions"))
    assert mine.recipe_file.read_bytes() == before


def test_other_inputs_are_refused_by_their_content(tmp_path: Path):
    recipe = RECIPE.override(["distillation.teacher=original"])
    own, images = Run.of(tmp_path, recipe), {"train": "1", "test": "2"}
    teacher = {"base_sha256": "t", "adapter_sha256": "a"}
    inputs = Inputs("questions", {"train": "q"}, images, "base", teacher)
    own.claim(recipe, inputs)
    run_folder.write_text(own.checkpoint / "state.safetensors", "state")
    own.refuse_other(recipe, inputs)
    own.refuse_other(recipe, Inputs("questions"))  # what is not known now is not compared
    own.refuse_other(recipe, replace(inputs, teacher={**teacher, "base_sha256": None}))
    changes = {
        "on other images, under the same names, than --data has now in test;": {"images": {**images, "test": "3"}},
        "with other weights of tiny-t5 than it has now;": {"base_sha256": "other"},
        "with another teacher than original is now;": {"teacher": {**teacher, "base_sha256": "other"}},
        "with another teacher than original is now; ": {"teacher": {**teacher, "adapter_sha256": None}},
    }
    for sentence, change in changes.items():
        with pytest.raises(UserError, match=rf"holds an unfinished run {sentence}"):
            own.claim(recipe, replace(inputs, **change))
    own.data_file.write_text('{"sha256": "questions", "images": 3}')
    with pytest.raises(UserError, match=r"data.json is damaged"):
        own.claim(recipe, inputs)
    own.data_file.write_text('{"sha256": "questions"}')  # of an older blipfit
    assert own.claim(recipe, inputs) == "started"


def test_a_folder_without_recipe_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"is not a run folder: it has no recipe.yaml"):
        Run(tmp_path).recipe()
    with pytest.raises(UserError, match="does not exist"):
        Run(tmp_path).result()
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="is not valid JSON"):
        Run(tmp_path).result()


def test_a_failure_is_recorded(tmp_path: Path):
    mine = Run.of(tmp_path, RECIPE)
    mine.claim(RECIPE, Inputs("questions"))
    mine.fail("non-finite loss")
    assert mine.failure() == "non-finite loss"
    assert json.loads(mine.failure_file.read_text()) == {"reason": "non-finite loss"}


def test_the_log_grows_by_lines_and_is_cut_back(tmp_path: Path):
    mine = Run(tmp_path)
    mine.truncate_log(lambda line: False)
    assert not mine.log_file.exists()
    for epoch in (1, 2, 3):
        mine.log({"epoch": epoch, "note": "naïve"})
    mine.truncate_log(lambda line: line["epoch"] < 3)
    assert run_folder.read_lines(mine.log_file) == [{"epoch": 1, "note": "naïve"}, {"epoch": 2, "note": "naïve"}]


def _half_written(path: Path, folder: bool = False) -> None:
    with run_folder.replacing(path) as temporary:
        temporary.mkdir() if folder else temporary.write_text("half")
        raise RuntimeError("killed")


def test_what_a_kill_left_behind_goes(tmp_path: Path):
    """A kill in the middle of a write leaves a temporary folder, one in the middle of a line half a line."""
    mine = Run.of(tmp_path, RECIPE)
    mine.claim(RECIPE, Inputs("questions"))
    mine.log({"epoch": 1})
    with mine.log_file.open("a") as file:
        file.write('{"epoch": 2, "lo')
    for target in (mine.adapter, mine.checkpoint / "state.safetensors"):
        leave_temporary_folder(target)
    run_folder.write_text(mine.checkpoint / "state.safetensors", "whole")
    assert mine.claim(RECIPE, Inputs("questions")) == "started"
    mine.truncate_log(lambda line: True)
    assert run_folder.read_lines(mine.log_file) == [{"epoch": 1}]
    left = sorted(path.name for path in mine.folder.rglob("*"))
    assert left == ["checkpoint", "data.json", "log.jsonl", "recipe.yaml", "state.safetensors"]


@pytest.mark.parametrize("before", [None, "old"])
def test_a_failed_write_changes_nothing(tmp_path: Path, before):
    file = tmp_path / "deep" / "x.json"
    if before:
        run_folder.write_text(file, before)
    with pytest.raises(TypeError):
        run_folder.write_json(file, {"x": object()})
    with pytest.raises(RuntimeError, match="killed"):
        _half_written(file)
    assert (file.read_text() if file.exists() else None) == before
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".")] == []


def test_a_folder_replaces_a_full_one(tmp_path: Path):
    for content in ("one", "two"):
        with run_folder.replacing(tmp_path / "adapter") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [path.name for path in (tmp_path / "adapter").iterdir()] == ["two"]
    with pytest.raises(RuntimeError, match="killed"):
        _half_written(tmp_path / "adapter", folder=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["adapter", "two"]


def test_versions_are_those_that_run():
    import torch
    import transformers

    import blipfit

    found = run_folder.versions()
    assert found["blipfit"] == blipfit.__version__
    assert torch.__version__.startswith(found["torch"])
    assert found["transformers"] == transformers.__version__


def test_a_package_without_metadata_has_an_unknown_version():
    assert run_folder.installed_version("a-package-that-nobody-installed") == "unknown"
    assert run_folder.installed_version("torch") == run_folder.versions()["torch"] != "unknown"


def test_a_folder_in_use_by_another_process_is_refused(tmp_path):
    run = Run(tmp_path / "icons" / "1")
    code = (
        "import sys, time; from pathlib import Path; from blipfit.run_folder import Run\n"
        "with Run(Path(sys.argv[1])).lock(): print('held', flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code, str(run.folder)]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(UserError, match="another process is training"), run.lock():
            pass
    finally:
        other.kill()
        other.communicate()
    with run.lock():  # what a killed process held is free
        assert (run.folder / ".lock").exists()
    assert not list(run.folder.iterdir())
