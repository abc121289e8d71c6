"""Folders: the official layouts, whole or absent, and read back as written."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from PIL import Image

from blipfit.data import icons
from blipfit.errors import UserError

COUNTS = {"train": 40, "val": 8, "test": 12}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    to = tmp_path_factory.mktemp("data") / "icons"
    report = icons.prepare(to, **COUNTS, seed=3, skills=None)
    assert report.counts == COUNTS
    return to


@pytest.fixture(scope="module")
def mme(tmp_path_factory):
    return icons.write_mme(tmp_path_factory.mktemp("data") / "mme", n=30, seed=3)


def test_what_is_loaded_is_what_was_drawn(folder):
    questions = [question for split in COUNTS for question in icons.load(folder, split)]
    assert len(questions) == sum(COUNTS.values())
    drawn = list(itertools.islice(icons.asked(3), len(questions)))
    for question, (of, ask) in zip(questions, drawn, strict=True):
        assert (question.question, question.choices, question.answer_index) == (
            ask.question,
            ask.choices,
            ask.answer_index,
        )
        assert question.answer == ask.answer
        assert question.tags == {"skill": ask.skill}
        with Image.open(question.image) as image:
            assert image.convert("RGB").tobytes() == icons.draw(of).tobytes()


def test_the_layout_is_that_of_iconqa(folder):
    problems = json.loads((folder / "problems.json").read_text())
    members = json.loads((folder / "pid_splits.json").read_text())
    assert {name: len(pids) for name, pids in members.items()} == {
        f"choose_txt_{split}": count for split, count in COUNTS.items()
    }
    for split in COUNTS:
        annotations = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert [record["id"] for record in annotations] == members[f"choose_txt_{split}"]
        for record in annotations:
            pid = record.pop("id")
            assert record == problems[pid]
            assert set(record) == {"question", "choices", "answer", "ques_type", "grade", "label", "skill", "split"}
            assert (record["ques_type"], record["split"]) == ("choose_txt", split)
            own = json.loads((folder / split / "choose_txt" / pid / "data.json").read_text())
            assert own == {key: value for key, value in record.items() if key != "split"}


def test_no_picture_is_asked_the_same_twice(tmp_path):
    icons.prepare(tmp_path / "few", train=300, val=100, test=100, seed=1, skills=["count_all", "exists"])
    seen = Counter(
        (question.image.read_bytes(), question.question)
        for split in COUNTS
        for question in icons.load(tmp_path / "few", split)
    )
    assert set(seen.values()) == {1}


def test_the_same_call_finds_its_work_done_and_another_is_refused(folder):
    before = (folder / "problems.json").stat()
    report = icons.prepare(folder, **COUNTS, seed=3, skills=None)
    assert report.counts == COUNTS
    assert (folder / "problems.json").stat() == before
    with pytest.raises(UserError, match="made otherwise"):
        icons.prepare(folder, **COUNTS, seed=4, skills=None)


def test_a_foreign_folder_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="holds other things"):
        icons.prepare(tmp_path, **COUNTS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_preparation_leaves_no_half_folder(tmp_path):
    code = "from blipfit.data import icons; import sys; icons.prepare(sys.argv[1], train=100000)"
    to = tmp_path / "icons"
    worker = subprocess.Popen([sys.executable, "-c", code, str(to)], env=dict(os.environ))
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".*/**/image.png")) and time.monotonic() < deadline:
        time.sleep(0.02)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    assert list(tmp_path.glob(".*/**/image.png"))
    assert not to.exists()
    icons.prepare(to, **COUNTS)
    assert len(icons.load(to, "train")) == COUNTS["train"]


def test_a_failing_preparation_leaves_nothing(tmp_path):
    with pytest.raises(ValueError, match="no skill"):
        icons.prepare(tmp_path / "icons", skills=["juggling"])
    assert list(tmp_path.iterdir()) == []


def test_mistakes_in_a_folder_are_named(folder, tmp_path):
    with pytest.raises(UserError, match="no split 'dev'"):
        icons.load(folder, "dev")
    with pytest.raises(UserError, match=r"train\.json is missing"):
        icons.load(tmp_path, "train")
    to = tmp_path / "icons"
    icons.prepare(to, train=2, val=1, test=1)
    file = to / "annotations" / "train.json"
    records = json.loads(file.read_text())
    file.write_text(json.dumps([{**records[0], "answer": 9}]))
    with pytest.raises(UserError, match=r"train\.json: record 0: 'answer' is 9"):
        icons.load(to, "train")
    file.write_text(json.dumps(records))
    (to / "train" / "choose_txt" / records[1]["id"] / "image.png").unlink()
    with pytest.raises(UserError, match="record 1: its image is missing"):
        icons.load(to, "train")


def test_mme_has_two_lines_a_picture(mme):
    for subtask in icons.SUBTASKS:
        lines = [line.split("\t") for line in (mme / f"{subtask}.txt").read_text().splitlines()]
        assert len(lines) == 60
        for yes, no in zip(lines[::2], lines[1::2], strict=True):
            assert yes[0] == no[0]
            assert (yes[2], no[2]) == ("Yes", "No")
            with Image.open(mme / subtask / yes[0]) as image:
                assert image.size == (64, 64)
        assert len({name for name, _, _ in lines}) == 30


def test_preferences_have_the_fields_and_a_random_order(tmp_path):
    to = icons.write_preferences(tmp_path / "preferences", n=200, seed=3)
    rows = [json.loads(line) for line in (to / "test.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 200
    first = 0
    for row in rows:
        assert sorted(row["human_ranking"]) == [0, 1]
        better, worse = (row["response"][row["human_ranking"].index(rank)] for rank in (0, 1))
        assert better == row["ground_truth"] != worse
        assert (to / row["image"]).is_file()
        assert row["query"]
        first += row["human_ranking"] == [0, 1]
    assert 70 < first < 130


def test_pictures_can_be_written_large(tmp_path):
    icons.prepare(tmp_path / "large", train=1, val=1, test=1, size=224)
    with Image.open(icons.load(tmp_path / "large", "train")[0].image) as image:
        assert image.size == (224, 224)
