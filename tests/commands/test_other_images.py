"""A run knows its images by content: whoever uses it with others under the same names is stopped or warned."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from blipfit import data as blipfit_data
from blipfit import sweep
from blipfit.commands import evaluate, retain
from blipfit.data.image_hashes import digest_images
from blipfit.errors import UserError
from blipfit.training.loop import train
from blipfit.training.model_cache import ModelCache

CPU = torch.device("cpu")
OTHER = "are not those that"


@pytest.fixture
def family() -> str:
    return "t5"


@pytest.fixture
def iconqa(iconqa: Path, tmp_path: Path) -> Path:
    """A copy of the data set, whose images a test may exchange."""
    return shutil.copytree(iconqa, tmp_path / "data")


@pytest.fixture
def exchange(iconqa: Path):
    """Write another image under the name of the first one of a split."""

    def write(split: str) -> None:
        file = blipfit_data.load("iconqa", iconqa, split)[0].image
        Image.new("RGB", (48, 40), "navy").save(file)

    return write


def plan(run, data: Path) -> sweep.Plan:
    return sweep.make_plan([run.recipe()], {"iconqa": data}, run.folder.parents[1], ModelCache("cpu"), 1)


def test_a_run_records_its_questions_and_images(finished_run, iconqa):
    result, recorded = finished_run.result(), json.loads(finished_run.data_file.read_text())
    splits = {split: blipfit_data.load("iconqa", iconqa, split) for split in ("train", "val", "test")}
    assert recorded["images"] == result["images_sha256"] == {s: digest_images(q) for s, q in splits.items()}
    assert recorded["questions"] == result["questions_sha256"]
    assert recorded["questions"] == {split: blipfit_data.fingerprint([q]) for split, q in splits.items()}
    assert recorded["base_sha256"] == result["base_sha256"]


@pytest.mark.parametrize("state", ["finished", "started"])
def test_training_and_sweep_refuse_other_images(finished_run, iconqa, exchange, state):
    results = finished_run.folder.parents[1]
    assert len(plan(finished_run, iconqa).finished) == 1
    if state == "started":
        finished_run.checkpoint.mkdir()
        (finished_run.checkpoint / "state.safetensors").write_bytes(b"")
        finished_run.result_file.unlink()
    exchange("train")
    exchange("test")
    message = r"on other images, under the same names, than --data has now in train, test; restore .*--results"
    with pytest.raises(UserError, match=message):
        train([finished_run.recipe()], iconqa, results, device="cpu")
    with pytest.raises(UserError, match=message):
        plan(finished_run, iconqa)


def test_a_run_without_recorded_images_is_used_as_before(finished_run, iconqa, exchange):
    recorded = json.loads(finished_run.data_file.read_text())
    finished_run.data_file.write_text(json.dumps({"sha256": recorded["sha256"]}))
    exchange("test")
    assert len(plan(finished_run, iconqa).finished) == 1
    assert "warnings" not in evaluate.run(finished_run.folder, iconqa, "test", CPU)


def test_evaluation_warns_of_other_images(finished_run, iconqa, exchange, capsys):
    recorded = finished_run.result()["images_sha256"]
    record = evaluate.run(finished_run.folder, iconqa, "test", CPU)
    assert ("warnings" in record, record["images_sha256"]) == (False, recorded["test"])
    exchange("test")
    record = evaluate.run(finished_run.folder, iconqa, "test", CPU)
    assert record["images_sha256"] != recorded["test"]
    (warning,) = record["warnings"]
    assert warning.startswith(f"the images of split test in {iconqa} {OTHER} {finished_run.folder} was made with")
    assert f"warning: {warning}" in capsys.readouterr().err
    assert "warnings" not in evaluate.run(finished_run.folder, iconqa, "val", CPU), "only the split that is evaluated"


def test_evaluation_warns_of_other_questions(finished_run, iconqa):
    file = iconqa / "annotations" / "test.json"
    entries = json.loads(file.read_text())
    file.write_text(json.dumps(entries[:-1]))
    (warning,) = evaluate.run(finished_run.folder, iconqa, "test", CPU)["warnings"]
    assert warning.startswith(f"the questions of split test in {iconqa} {OTHER}")


def test_evaluation_and_retention_on_the_own_data_set_warn_of_other_images(finished_run, iconqa, exchange, tmp_path):
    on, folder = f"iconqa={iconqa}", str(finished_run.folder)
    options = evaluate.OnOptions(limit=2, results=tmp_path / "evaluations")
    model = finished_run.recipe().model.name
    assert "warnings" not in retain.run(model, [folder], on, None, "test", 2, None, CPU)
    exchange("test")
    (record,) = evaluate.run_on(folder, on, CPU, options)
    assert OTHER in record["warnings"][0]
    (file,) = finished_run.folder.glob("evaluations/*/evaluation.json")
    written = json.loads(file.read_text())
    assert written["warnings"] == record["warnings"]
    assert written["images_sha256"] == digest_images(blipfit_data.load("iconqa", iconqa, "test", 2))
    record = retain.run(model, [folder], on, None, "test", 2, None, CPU)
    assert OTHER in record["warnings"][0]
    assert record["on"]["iconqa"]["images_sha256"] == written["images_sha256"]


def test_other_questions_of_the_same_data_set_are_other_data(finished_run, iconqa, exchange):
    """`--on` may name any folder, so questions that differ are no reason for a warning."""
    file = iconqa / "annotations" / "test.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:-1]))
    exchange("test")
    (record,) = evaluate.run_on(str(finished_run.folder), f"iconqa={iconqa}", CPU, evaluate.OnOptions(limit=2))
    assert "warnings" not in record
