"""`blipfit shrink` from its arguments to the folder, and planned without weights."""

import pytest
import torch

import checkpoints
from blipfit import grid
from blipfit.adapters import open_model
from blipfit.commands import shrink
from blipfit.compression.qformer_size import Size
from blipfit.errors import UserError
from blipfit.report import terminal
from blipfit.training.loop import train

XL = "Salesforce/instructblip-flan-t5-xl"
ISSUE = {"hidden": 512, "heads": 8, "intermediate": 1024, "layers": 8, "queries": 16, "cross_every": 2}
CPU = torch.device("cpu")


def printed(record) -> str:
    screen = terminal.console()
    with screen.capture() as caught:
        for part in shrink.render(record):
            screen.print(part, soft_wrap=isinstance(part, str))
    return caught.get()


def test_a_plan_needs_no_weights():
    record = shrink.run_dry(XL, ISSUE)
    assert record["before"]["parameters"]["qformer"] == 185_660_160
    assert record["after"]["parameters"]["projection"] == 512 * 2048 + 2048
    assert record["shares"]["qformer_parameters"] == pytest.approx(0.267, abs=0.001)
    assert record["shares"]["query_flops"] == pytest.approx(0.254, abs=0.001)
    text = printed(record)
    assert "185,660,160" in text
    assert "only planned" in text


def test_a_folder_is_made(small, family, iconqa, tmp_path):
    sizes = {"hidden": 16, "heads": 2, "intermediate": None, "layers": None, "queries": 2, "cross_every": None}
    to = tmp_path / "smaller"
    record = shrink.run(str(small[family]), sizes, "taylor", "iconqa", iconqa, 8, 0, to, CPU)
    assert record["questions"] == 8
    assert record["shares"]["qformer_parameters"] < 0.6
    assert Size.from_config(checkpoints.load(to).hf.config).hidden == 16
    text = printed(record)
    assert "measured and repaired on 8 questions of iconqa" in text
    assert f"`blipfit train iconqa recover --model {to} --data {iconqa}`" in text


def test_the_folder_is_trained_like_any_model(small, family, iconqa, tmp_path):
    """Recovery by the ordinary loop: LoRA above inherited weights, and the Q-Former whole."""
    to = tmp_path / "smaller"
    shrink.run(str(small[family]), {"hidden": 16, "heads": 2}, "taylor", "iconqa", iconqa, 8, 0, to, CPU)
    short = ["training.max_epochs=1", "training.batch_size=4", "data.images=off"]
    for experiment in (28, "baseline"):
        recipe = grid.recipe("iconqa", experiment, str(to)).override(short)
        (run,) = train([recipe], iconqa, tmp_path / "results", device="cpu")
        assert run.state() == "finished"
    with open_model.open_model(str(run.folder), "cpu").adapter() as backbone:
        assert backbone.hf.config.qformer_config.hidden_size == 16


def test_without_questions_it_says_that_nothing_was_repaired(small, tmp_path):
    sizes = {"hidden": 16, "heads": 2}
    record = shrink.run(str(small["t5"]), sizes, "magnitude", None, None, 8, 0, tmp_path / "smaller", CPU)
    assert "nothing was repaired" in printed(record)


def test_mistakes_are_told_before_anything_is_loaded(small, tmp_path):
    model = str(small["t5"])
    with pytest.raises(UserError, match="unknown importance 'luck'"):
        shrink.run(model, {}, "luck", None, None, 8, 0, tmp_path / "a", CPU)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").touch()
    with pytest.raises(UserError, match="exists already"):
        shrink.run(model, {}, "taylor", None, None, 8, 0, tmp_path / "b", CPU)
    with pytest.raises(UserError, match="not divisible"):
        shrink.run(model, {"hidden": 30}, "taylor", None, None, 8, 0, tmp_path / "c", CPU)
    assert not (tmp_path / "c").exists()
