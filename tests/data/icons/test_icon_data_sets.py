"""Folders have the official layouts, are complete or absent, and load as written."""

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


def test_loading_returns_the_generated_questions_and_pictures(folder):
    questions = [question for split in COUNTS for question in icons.load(folder, split)]
    assert len(questions) == sum(COUNTS.values())
    pairs = list(itertools.islice(icons.iterate_questions(3), len(questions)))
    for question, (scene, expected) in zip(questions, pairs, strict=True):
        assert question.question == expected.question
        assert question.choices == expected.choices
        assert question.answer_index == expected.answer_index
        assert question.answer == expected.answer
        assert question.tags == {"skill": expected.skill}
        with Image.open(question.image) as image:
            assert image.convert("RGB").tobytes() == icons.draw(scene).tobytes()


def test_the_layout_is_that_of_iconqa(folder):
    problems = json.loads((folder / "problems.json").read_text())
    split_pids = json.loads((folder / "pid_splits.json").read_text())
    assert {name: len(pids) for name, pids in split_pids.items()} == {
        f"choose_txt_{split}": count for split, count in COUNTS.items()
    }
    for split in COUNTS:
        annotations = json.loads((folder / "annotations" / f"{split}.json").read_text())
        assert [record["id"] for record in annotations] == split_pids[f"choose_txt_{split}"]
        for record in annotations:
            pid = record.pop("id")
            assert record == problems[pid]
            assert set(record) == {"question", "choices", "answer", "ques_type", "grade", "label", "skill", "split"}
            assert (record["ques_type"], record["split"]) == ("choose_txt", split)
            data = json.loads((folder / split / "choose_txt" / pid / "data.json").read_text())
            assert data == {key: value for key, value in record.items() if key != "split"}


def test_no_pair_of_picture_and_question_occurs_twice(tmp_path):
    icons.prepare(tmp_path / "few", train=300, val=100, test=100, seed=1, skills=["count_all", "exists"])
    counts = Counter(
        (question.image.read_bytes(), question.question)
        for split in COUNTS
        for question in icons.load(tmp_path / "few", split)
    )
    assert set(counts.values()) == {1}


def test_a_second_call_with_the_same_settings_changes_nothing_and_with_other_settings_is_refused(folder):
    before = (folder / "problems.json").stat()
    report = icons.prepare(folder, **COUNTS, seed=3, skills=None)
    assert report.counts == COUNTS
    assert (folder / "problems.json").stat() == before
    with pytest.raises(UserError, match="was written with other settings"):
        icons.prepare(folder, **COUNTS, seed=4, skills=None)


def test_a_folder_with_other_files_is_refused_and_not_changed(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match="contains other files"):
        icons.prepare(tmp_path, **COUNTS)
    assert [path.name for path in tmp_path.iterdir()] == ["letter.txt"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_preparation_leaves_no_incomplete_folder(tmp_path):
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


def test_a_failed_preparation_leaves_no_files(tmp_path):
    with pytest.raises(ValueError, match="unknown skill 'juggling'"):
        icons.prepare(tmp_path / "icons", skills=["juggling"])
    assert list(tmp_path.iterdir()) == []


def test_errors_in_a_folder_name_the_file_and_the_record(folder, tmp_path):
    with pytest.raises(UserError, match="unknown split 'dev'"):
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


def test_mme_has_two_lines_per_picture(mme):
    for subtask in icons.SUBTASKS:
        lines = [line.split("\t") for line in (mme / f"{subtask}.txt").read_text().splitlines()]
        assert len(lines) == 60
        for yes, no in zip(lines[::2], lines[1::2], strict=True):
            assert yes[0] == no[0]
            assert (yes[2], no[2]) == ("Yes", "No")
            with Image.open(mme / subtask / yes[0]) as image:
                assert image.size == (64, 64)
        assert len({name for name, _, _ in lines}) == 30


def test_preferences_have_the_fields_of_vl_rewardbench_and_a_random_order(tmp_path):
    to = icons.write_preferences(tmp_path / "preferences", n=200, seed=3)
    rows = [json.loads(line) for line in (to / "test.jsonl").read_text().splitlines()]
    assert len({row["id"] for row in rows}) == 200
    good_first = 0
    for row in rows:
        assert sorted(row["human_ranking"]) == [0, 1]
        better, worse = (row["response"][row["human_ranking"].index(rank)] for rank in (0, 1))
        assert better == row["ground_truth"] != worse
        assert (to / row["image"]).is_file()
        assert row["query"]
        good_first += row["human_ranking"] == [0, 1]
    assert 70 < good_first < 130


def test_pictures_have_the_requested_size(tmp_path):
    icons.prepare(tmp_path / "large", train=1, val=1, test=1, size=224)
    with Image.open(icons.load(tmp_path / "large", "train")[0].image) as image:
        assert image.size == (224, 224)
