"""`blipfit retain` from its arguments to the table, the figure and the verdict."""

import pytest
import torch

from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.evaluation import retention
from blipfit.report import retaining, shrinking, terminal

CPU = torch.device("cpu")
SIZES = {"hidden": 16, "heads": 2}


@pytest.fixture(scope="module")
def smaller(small, tmp_path_factory):
    """A smaller model of each of the small checkpoints."""
    root = tmp_path_factory.mktemp("smaller")
    for family, folder in small.items():
        shrinking.run(str(folder), SIZES, "magnitude", None, None, 8, 0, root / family, CPU)
    return {family: root / family for family in small}


def printed(record) -> str:
    screen = terminal.console()
    with screen.capture() as caught:
        for part in retaining.shown(record):
            screen.print(part, soft_wrap=isinstance(part, str))
    return caught.get()


def test_a_candidate_beside_its_original(small, smaller, family, iconqa, tmp_path):
    icons.write_mme(tmp_path / "mme", 3, seed=5)
    on = f"iconqa={iconqa},mme={tmp_path / 'mme'}"
    record = retaining.run(str(small[family]), [str(smaller[family])], on, None, "test", 4, 0.7, CPU)
    (one,) = record["candidates"]
    assert list(record["on"]) == list(one["judges"]) == ["iconqa", "mme"]
    assert record["on"]["iconqa"]["samples"] == 4
    assert 0 < one["shares"]["query_flops"] < one["shares"]["flops"] < 1
    assert one["shares"]["qformer_parameters"] < 0.6
    # A random model is not above chance: nothing is kept for sure.
    assert one["misses"] == ["iconqa", "mme"]
    text = printed(record)
    assert "does not surely keep 70 %" in text
    assert "not surely above chance" in text
    retaining.figure(record, tmp_path / "figures" / "kept.png")
    assert (tmp_path / "figures" / "kept.png").read_bytes()[1:4] == b"PNG"


def test_an_original_against_itself_keeps_all(small, smaller, family, iconqa, monkeypatch, tmp_path):
    """A copy that answers alike: on answers that are surely above chance its retention is 1, and it holds."""
    right = [True] * 40 + [False] * 2
    monkeypatch.setattr(retention, "answers", lambda names, judges, *a, **k: [{"iconqa": right}] * len(names))
    monkeypatch.setattr(retention.Judge, "chance", property(lambda self: [0.5] * 42))
    record = retaining.run(str(small[family]), [str(smaller[family])], "iconqa", iconqa, "test", None, 0.99, CPU)
    (one,) = record["candidates"]
    assert one["retention"] == 1.0
    assert one["misses"] == []
    assert one["pareto"]
    assert "keeps at least 99 % on every judge" in printed(record)
    retaining.figure(record, tmp_path / "kept.svg")
    assert "iconqa" in (tmp_path / "kept.svg").read_text()


@pytest.mark.parametrize(
    ("candidates", "on", "data", "sentence"),
    [
        ([], "", None, "say on what"),
        ([], "iconqa,mme", "x", "--data names one folder"),
        ([], "iconqa,iconqa", None, "names a data set twice"),
        (["nowhere-model"], "iconqa", None, "unknown model 'nowhere-model'"),
    ],
)
def test_mistakes(small, candidates, on, data, sentence, tmp_path):
    with pytest.raises(UserError, match=sentence):
        retaining.run(str(small["t5"]), candidates, on, data and tmp_path / data, "test", None, None, CPU)


def test_a_model_named_twice(small):
    with pytest.raises(UserError, match="named twice"):
        retaining.run(str(small["t5"]), [str(small["t5"])], "iconqa", None, "test", None, None, CPU)


def test_a_figure_of_an_unknown_kind(tmp_path):
    with pytest.raises(UserError, match=r"ends in .png, .svg or .pdf"):
        retaining.figure({"candidates": [], "on": {}}, tmp_path / "kept.docx")
