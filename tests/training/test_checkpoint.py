"""Checkpoints: whole or absent, checked when they are read, and the same save for all experiments of a bank."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blipfit import grid
from blipfit.errors import UserError
from blipfit.run_folder import Inputs, Run
from blipfit.training import bank_member, checkpoint
from blipfit.training.bank_member import Member
from blipfit.training.checkpoint import Progress, Save

PROGRESS = Progress(
    epoch=2,
    step=5,
    updates=25,
    loss_sum=12.5,
    label_count=7,
    best_score=100 / 3,
    best_epoch=1,
    bad_epochs=1,
    seconds=0.1 + 0.2,
    history=[{"epoch": 1, "loss": 0.1, "val_accuracy": 100 / 3}],
)
TENSORS = {
    "values": {"a.b": torch.randn(2, 3), "c/d": torch.tensor([1.0]), "e": torch.tensor(7), "f": torch.zeros(0)},
    "best": {"a.b": torch.randn(2, 3).double(), "kept": torch.tensor([True, False]), "h": torch.randn(3).bfloat16()},
}


def test_what_was_saved_comes_back_to_the_bit(tmp_path: Path):
    written = checkpoint.write(tmp_path / "checkpoint", "id", ["a 1", "a 2"], PROGRESS, TENSORS)
    (save,), damaged = checkpoint.read_saves(tmp_path / "checkpoint")
    assert save == written
    assert (save.id, save.bank, save.progress, save.number, damaged) == ("id", ("a 1", "a 2"), PROGRESS, 1, [])
    tensors = save.read_tensors()
    assert tensors.keys() == TENSORS.keys()
    for group, named in TENSORS.items():
        assert tensors[group].keys() == named.keys()
        for name, tensor in named.items():
            assert tensors[group][name].dtype == tensor.dtype
            assert torch.equal(tensors[group][name], tensor)
    assert len(list((tmp_path / "checkpoint").iterdir())) == 1


def test_a_save_keeps_the_progress_of_its_time(tmp_path: Path):
    progress = replace(PROGRESS, history=[])
    save = checkpoint.write(tmp_path, "id", [], progress, TENSORS)
    progress.history.append({"epoch": 9})
    progress.step = 9
    assert (save.progress.history, save.position) == ([], (False, 2, 5))


def test_no_folder_has_no_saves(tmp_path: Path):
    assert checkpoint.read_saves(tmp_path / "none") == ([], [])
    assert checkpoint.read_bank(tmp_path / "none") == ()


def test_a_failed_save_leaves_the_state_of_before(tmp_path: Path):
    checkpoint.write(tmp_path, "first", [], PROGRESS, TENSORS)
    with pytest.raises(AttributeError):
        checkpoint.write(tmp_path, "second", [], PROGRESS, {"values": {"a": None}})  # type: ignore[dict-item]
    with pytest.raises(TypeError):
        checkpoint.write(tmp_path, "second", [], Progress(history=[{"epoch": object()}]), TENSORS)
    (save,), _ = checkpoint.read_saves(tmp_path)
    assert (save.id, save.progress) == ("first", PROGRESS)
    assert len(list(tmp_path.iterdir())) == 1


def test_two_saves_are_kept(tmp_path: Path):
    for name in ("first", "second", "third", "fourth"):
        checkpoint.write(tmp_path, name, [], PROGRESS, TENSORS)
        assert [save.id for save in checkpoint.read_saves(tmp_path)[0]][:1] == [name]
        checkpoint.remove_old(tmp_path)
    assert [(save.id, save.number) for save in checkpoint.read_saves(tmp_path)[0]] == [("fourth", 4), ("third", 3)]
    checkpoint.remove_newer(tmp_path, 3)
    assert [save.id for save in checkpoint.read_saves(tmp_path)[0]] == ["third"]
    checkpoint.remove_newer(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def _spoil(file: Path, how: str) -> None:
    from safetensors.torch import save_file

    content = file.read_bytes()
    if how == "cut":
        file.write_bytes(content[:-5])
    elif how == "empty":
        file.write_bytes(b"")
    elif how == "bit":
        file.write_bytes(content[:-5] + bytes([content[-5] ^ 1]) + content[-4:])
    elif how == "progress":
        file.write_bytes(content.replace(b"12.5", b"13.5"))
    else:
        save_file({"values/a": torch.ones(1)}, file, {"header": "{"} if how == "header" else None)


@pytest.mark.parametrize("how", ["cut", "empty", "bit", "progress", "header", "foreign"])
def test_a_damaged_save_is_found(tmp_path: Path, how: str):
    checkpoint.write(tmp_path, "first", ["x"], PROGRESS, TENSORS)
    checkpoint.write(tmp_path, "second", ["x"], PROGRESS, TENSORS)
    older, newer = sorted(tmp_path.iterdir())
    _spoil(newer, how)
    (save,), damaged = checkpoint.read_saves(tmp_path)
    assert (save.id, damaged) == ("first", [newer])
    _spoil(older, how)
    with pytest.raises(UserError, match=r"is damaged .*; delete .* to train this experiment from the start"):
        checkpoint.read_saves(tmp_path)


def _saves(ids: str, bank: Sequence[str], first: int = 2, is_done: bool = False) -> list[Save]:
    """Saves with one letter each as their ids, newest first; the oldest has the number `first`."""
    numbers = range(first + len(ids) - 1, first - 1, -1)
    progress = Progress(done=is_done)
    return [Save(Path("x"), number, letter, tuple(bank), progress) for letter, number in zip(ids, numbers, strict=True)]


ALL = ("A", "B", "C")
COMMON_SAVES = {
    "the same newest": ({"A": _saves("ts", ALL), "B": _saves("ts", ALL)}, "tt"),
    "B lacks the newest": ({"A": _saves("ts", ALL), "B": _saves("s", ALL)}, "ss"),
    "three on disk": ({"A": _saves("tsr", ALL), "B": _saves("sr", ALL)}, "ss"),
    "A lacks it, B and C have it": ({"A": _saves("sr", ALL), "B": _saves("ts", ALL), "C": _saves("tsr", ALL)}, "sss"),
    "two steps back": ({"A": _saves("tsr", ALL), "B": _saves("sr", ALL), "C": _saves("r", ALL)}, "rrr"),
    "the first save is incomplete": ({"A": _saves("s", ALL, 1), "B": []}, "--"),
    "B's folder was deleted later": ({"A": _saves("ts", ALL, 1), "B": []}, "t-"),
    "B went on alone": ({"A": _saves("ts", ALL), "B": _saves("yx", ["B"])}, "ty"),
    "B is of another bank": ({"A": _saves("ts", ["A", "C"]), "B": _saves("s", ["B"])}, "ts"),
    "B had stopped before": ({"A": _saves("ts", ALL), "B": _saves("s", ALL, is_done=True)}, "ts"),
    "B would have stopped now": ({"A": _saves("s", ALL), "B": [*_saves("t", ALL, 3, True), *_saves("s", ALL)]}, "ss"),
    "none has begun": ({"A": [], "B": []}, "--"),
}


@pytest.mark.parametrize("case", COMMON_SAVES)
def test_all_of_a_bank_continue_from_one_save(case: str):
    saves, expected = COMMON_SAVES[case]
    result = checkpoint.find_common_saves(saves)
    assert "".join(save.id if save else "-" for save in result.values()) == expected
    assert list(result) == list(saves)


def test_damage_sends_the_whole_bank_back(tmp_path: Path):
    """Files, not lists: experiment 14's newest file is damaged, so 13 continues from the older one too."""
    members = [Member(Run(tmp_path / name), grid.recipe("icons", name, "tiny"), Inputs("")) for name in ("13", "14")]
    titles = [member.recipe.title for member in members]
    for number, name in enumerate(("first", "second")):
        for member in members:
            checkpoint.write(member.run.checkpoint, name, titles, Progress(step=number + 1), TENSORS)
    (file,) = members[1].run.checkpoint.glob("*2.safetensors")
    _spoil(file, "bit")
    reported = []
    bank_member.load_checkpoints(members, lambda *paths: reported.append(paths))
    assert [(member.save_id, member.position) for member in members] == [("first", (False, 0, 1))] * 2
    assert reported == [(file, file.with_name("state-000001.safetensors"))]
    bank_member.remove_unused_checkpoints(members)
    assert [[path.name for path in m.run.checkpoint.iterdir()] for m in members] == [["state-000001.safetensors"]] * 2


def _member(number: int, progress: Progress, bank: Sequence[int] = (), save_id: str = "s") -> Member:
    recipe = grid.recipe("icons", number, "tiny")
    titles = tuple(grid.recipe("icons", n, "tiny").title for n in bank)
    save = Save(Path("x"), 1, save_id, titles, progress) if bank else None
    return Member(Run(Path(str(number))), recipe, Inputs(""), progress, save)


def _groups(*members: Member) -> list[list[str]]:
    return [[member.recipe.experiment for member in bank] for bank in bank_member.group_into_banks(members)]


def test_a_bank_gets_its_done_experiments_back():
    bank = (13, 14, 15)
    done, going = Progress(epoch=1, done=True), Progress(epoch=3)
    assert _groups(_member(13, going, bank), _member(14, done, bank), _member(15, going, bank)) == [["13", "14", "15"]]
    assert _groups(_member(14, done, (14,)), _member(15, going, (15,))) == [["15"], ["14"]]
    late = Progress(epoch=4, done=True)
    assert _groups(_member(13, done, bank), _member(14, late, bank)) == [["13", "14"]]


def test_equal_positions_share_a_bank_and_others_do_not():
    assert _groups(_member(15, Progress()), _member(13, Progress()), _member(14, Progress(step=1))) == [
        ["15", "13"],
        ["14"],
    ]
