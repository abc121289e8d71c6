"""`blipfit retain` from its arguments to the table, the figure and the verdict."""

import json
import sys

import pytest
import torch
from matplotlib import rc_context

from blipfit import __main__ as entry_point
from blipfit.commands import retain, shrink
from blipfit.data import icons
from blipfit.errors import UserError
from blipfit.report import terminal

CPU = torch.device("cpu")
SIZES = {"hidden": 16, "heads": 2}


@pytest.fixture(scope="module")
def smaller(small, tmp_path_factory):
    """A smaller model of each of the small checkpoints."""
    root = tmp_path_factory.mktemp("smaller")
    for family, folder in small.items():
        shrink.run(str(folder), SIZES, "magnitude", None, None, 8, 0, root / family, CPU)
    return {family: root / family for family in small}


def printed(record) -> str:
    screen = terminal.console()
    with screen.capture() as caught:
        for part in retain.render(record):
            screen.print(part, soft_wrap=isinstance(part, str))
    return caught.get()


def test_a_candidate_beside_its_original(small, smaller, family, iconqa, tmp_path):
    icons.write_mme(tmp_path / "mme", 3, seed=5)
    on = f"iconqa={iconqa},mme={tmp_path / 'mme'}"
    record = retain.run(str(small[family]), [str(smaller[family])], on, None, "test", 4, 0.7, CPU)
    (one,) = record["candidates"]
    assert list(record["on"]) == list(one["on"]) == ["iconqa", "mme"]
    assert record["on"]["iconqa"]["samples"] == 4
    assert 0 < one["shares"]["query_flops"] < one["shares"]["flops"] < 1
    assert one["shares"]["qformer_parameters"] < 0.6
    # A random model is not above chance: nothing is kept for sure.
    assert one["misses"] == ["iconqa", "mme"]
    text = printed(record)
    assert "on iconqa, mme the lower end of the 95 % confidence interval is below 70 %" in text
    assert "interval is not above chance" in text
    retain.write_figure(record, tmp_path / "figures" / "kept.png")
    assert (tmp_path / "figures" / "kept.png").read_bytes()[1:4] == b"PNG"


def test_the_figure_names_its_points(tmp_path):
    def candidate(name, share, ratio):
        corrected = {"ratio": ratio, "interval": None if ratio is None else [ratio - 0.1, ratio + 0.1]}
        return {"name": name, "shares": {"qformer_parameters": share}, "on": {"icons": {"corrected": corrected}}}

    candidates = [candidate("results/half", 0.5, 0.9), candidate("results/tenth", 0.1, 0.7), candidate("gone", 1, None)]
    record = {"base": "tiny-t5", "on": {"icons": {}}, "at_least": None, "candidates": candidates}
    with rc_context({"svg.fonttype": "none"}):  # letters stay letters
        retain.write_figure(record, tmp_path / "kept.svg")
    text = (tmp_path / "kept.svg").read_text()
    assert [name for name in ("half", "tenth", "gone") if f">{name}<" in text] == ["half", "tenth"]


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """Questions of a kind that the miniatures were taught, and one of them shrunk: to its own size, and to ruin."""
    root = tmp_path_factory.mktemp("taught")
    icons.prepare(root / "icons", train=4, val=2, test=60, seed=77, skills=("color", "shape", "exists"))
    for name, sizes in (("same", {}), ("ruin", SIZES)):
        shrink.run("tiny-t5", sizes, "magnitude", None, None, 8, 0, root / name, CPU)
    return root


def test_what_keeps_all_and_what_does_not(taught):
    names = [str(taught / name) for name in ("same", "ruin")]
    record = retain.run("tiny-t5", names, "icons", taught / "icons", "test", None, 0.9, CPU)
    same, ruin = record["candidates"]
    assert same["retention"] == 1.0
    assert same["shares"] == dict.fromkeys(same["shares"], 1.0)
    assert (same["misses"], same["pareto"]) == ([], True)
    assert ruin["retention"] < 0.8
    assert (ruin["misses"], ruin["pareto"]) == (["icons"], True)
    assert ruin["on"]["icons"]["raw"]["ratio"] > ruin["retention"]
    text = printed(record)
    assert f"{names[0]} retains at least 90 % on every data set" in text
    assert f"{names[1]}: on icons the lower end of the 95 % confidence interval is below 90 %" in text
    retain.write_figure(record, taught / "kept.svg")
    assert "icons" in (taught / "kept.svg").read_text()


@pytest.mark.parametrize(("name", "code"), [("same", 0), ("ruin", 1)])
def test_the_exit_code_says_whether_it_holds(taught, name, code, monkeypatch, capsys):
    arguments = ["retain", "tiny-t5", taught / name, "--on", f"icons={taught / 'icons'}", "--at-least", "0.9", "--json"]
    monkeypatch.setattr(sys, "argv", ["blipfit", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        entry_point.main()
    assert ended.value.code == code
    assert bool(json.loads(capsys.readouterr().out)["candidates"][0]["misses"]) == bool(code)


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
        retain.run(str(small["t5"]), candidates, on, data and tmp_path / data, "test", None, None, CPU)


def test_a_model_named_twice(small):
    with pytest.raises(UserError, match="named twice"):
        retain.run(str(small["t5"]), [str(small["t5"])], "iconqa", None, "test", None, None, CPU)


def test_a_figure_of_an_unknown_kind(tmp_path):
    with pytest.raises(UserError, match=r"ends in .png, .svg or .pdf"):
        retain.write_figure({"candidates": [], "on": {}}, tmp_path / "kept.docx")
