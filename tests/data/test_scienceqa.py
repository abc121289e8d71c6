"""ScienceQA: the official layout or the hub's parquet is converted to the published annotation files."""

import json
import os
import shutil
from pathlib import Path

import pytest

from blipfit.data import scienceqa
from blipfit.errors import UserError
from blipfit.evaluation import metrics

PUBLISHED_TRAIN = (
    '[{"image": "scienceqa/images/train/3/image.png", "question": "Question 3?", "answer": "(a) alpha", '
    '"choices": ["alpha", "beta", "gamma"], "context": " Lecture 3, na\\u00efve.", "question_id": "3"}, '
    '{"image": "scienceqa/images/train/1/image.png", "question": "Question 1?", "answer": "(b) beta", '
    '"choices": ["alpha", "beta", "gamma"], "context": " Lecture 1, na\\u00efve.", "question_id": "1"}]'
)


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def prepared(official_scienceqa: Path, tmp_path: Path) -> Path:
    scienceqa.prepare(official_scienceqa, tmp_path / "sqa")
    return tmp_path / "sqa"


def test_annotation_file_is_the_published_one_to_the_byte(prepared: Path):
    assert (prepared / "scienceqa_train.json").read_bytes() == PUBLISHED_TRAIN.encode()


def test_report_counts_what_is_written_and_what_is_left_out(official_scienceqa: Path, tmp_path: Path):
    report = scienceqa.prepare(official_scienceqa, tmp_path / "sqa")
    assert report.counts == {"train": 2, "val": 2, "test": 3}
    assert report.left_out == {"without an image": 1}
    assert sum(report.images.values()) == 7
    assert "2 train / 2 val / 3 test" in str(report)
    assert "left out: 1 without an image" in str(report)
    assert "6218 train / 2097 val / 2017 test" in str(report)


def test_load_gives_questions_in_the_published_order(prepared: Path):
    first, second = scienceqa.load(prepared, "train")
    assert (first.id, second.id) == ("3", "1")
    assert first.question == "Question 3?"
    assert first.choices == ("alpha", "beta", "gamma")
    assert (first.answer, first.answer_index) == ("alpha", 0)
    assert first.context == " Lecture 3, naïve."
    assert first.image == prepared / "images/train/3/image.png"


def test_load_gives_the_tags_of_the_leaderboard(prepared: Path):
    without_hint, _ = scienceqa.load(prepared, "train")
    assert without_hint.tags == {
        "subject": "natural science",
        "grade": "grade4",
        "topic": "biology",
        "category": "Ecosystems",
        "skill": "Interpret food webs",
        "context": "image",
    }
    assert [q.tags["context"] for q in scienceqa.load(prepared, "test")] == [
        "text+image",
        "image",
        "text+image",
    ]


def test_folder_of_the_published_experiments_loads_unchanged(prepared: Path, tmp_path: Path):
    # It has /input/scienceqa/*.json and the images in /input/scienceqa/images, but no file with tags.
    published = tmp_path / "input" / "scienceqa"
    shutil.copytree(prepared, published)
    (published / scienceqa.TAGS_FILE).unlink()
    questions = scienceqa.load(published, "test")
    assert [q.tags for q in questions] == [{"context": c} for c in ("text+image", "image", "text+image")]
    assert all(q.image.is_relative_to(published) for q in questions)


def test_tags_come_from_the_official_file_if_the_folder_has_it(prepared: Path, official_scienceqa: Path):
    with_tags = scienceqa.load(prepared, "val")
    (prepared / scienceqa.TAGS_FILE).unlink()
    shutil.copy(official_scienceqa / "problems.json", prepared)
    assert scienceqa.load(prepared, "val") == with_tags


@pytest.mark.parametrize(
    "image",
    ["images/train/3/image.png", "scienceqa/images/train/3/image.png", "/else/sqa/images/train/3/image.png"],
)
def test_image_is_found_whatever_folder_its_path_is_relative_to(prepared: Path, image: str):
    edit_json(prepared / "scienceqa_train.json", lambda entries: entries[0].update(image=image))
    assert scienceqa.load(prepared, "train")[0].image == prepared / "images/train/3/image.png"


def test_image_outside_the_folder_is_found_by_its_absolute_path(prepared: Path, tmp_path: Path, draw):
    photo = draw(tmp_path / "photos" / "a.png")
    edit_json(prepared / "scienceqa_train.json", lambda entries: entries[0].update(image=str(photo)))
    assert scienceqa.load(prepared, "train")[0].image == photo


def test_an_error_names_the_paths_of_a_missing_image(prepared: Path):
    (prepared / "images/train/3/image.png").unlink()
    with pytest.raises(UserError, match=r"entry 1: its image is missing \(looked for .*sqa/images/train/3") as e:
        scienceqa.load(prepared, "train")
    assert str(prepared.parent / "scienceqa/images/train/3/image.png") in str(e.value)


def test_prepared_folder_does_not_need_its_source(prepared: Path, official_scienceqa: Path):
    shutil.rmtree(official_scienceqa)
    assert all(q.image.stat().st_size for q in scienceqa.load(prepared, "train"))


def test_images_are_copied_where_links_are_not_allowed(official_scienceqa: Path, tmp_path: Path, monkeypatch):
    def refuse(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    report = scienceqa.prepare(official_scienceqa, tmp_path / "sqa")
    assert report.images == {"copied": 7}
    assert len(scienceqa.load(tmp_path / "sqa", "train")) == 2


def test_preparing_again_replaces_its_files_and_keeps_others(prepared: Path, official_scienceqa: Path):
    (prepared / "notes.txt").write_text("mine")
    edit_json(official_scienceqa / "pid_splits.json", lambda splits: splits.update(train=["1"]))
    scienceqa.prepare(official_scienceqa, prepared)
    assert [q.id for q in scienceqa.load(prepared, "train")] == ["1"]
    assert (prepared / "notes.txt").read_text() == "mine"
    assert [path.name for path in prepared.parent.iterdir() if path.name.startswith(".")] == []


def test_preparing_in_place_keeps_the_official_files(official_scienceqa: Path):
    before = (official_scienceqa / "problems.json").read_bytes()
    report = scienceqa.prepare(official_scienceqa, official_scienceqa)
    assert report.images == {"kept": 7}
    assert (official_scienceqa / "problems.json").read_bytes() == before
    assert len(scienceqa.load(official_scienceqa, "test")) == 3


def test_foreign_folder_is_not_written_into(official_scienceqa: Path, tmp_path: Path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("…")
    with pytest.raises(UserError, match=r"contains other files \(thesis\.tex\); give a new or empty folder"):
        scienceqa.prepare(official_scienceqa, tmp_path / "home")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])


BROKEN = {
    "missing image": (
        lambda root: (root / "images/val/4/image.png").unlink(),
        r"problem 4: its image is missing \(looked for .*; unpack https://\S*/val\.zip there",
    ),
    "truncated image": (
        lambda root: truncate(root / "images/val/4/image.png"),
        r"images/val/4/image\.png is damaged or not an image .* download or copy the file again",
    ),
    "invalid JSON": (
        lambda root: (root / "problems.json").write_text('{\n "1": {\n  "question": \n}}'),
        r"problems\.json:4: not valid JSON \(Expecting value, column 1\)",
    ),
    "not text": (
        lambda root: (root / "problems.json").write_bytes(b'{\n"1": "\xff"}'),
        r"problems\.json:2: not UTF-8 text",
    ),
    "a list": (
        lambda root: (root / "problems.json").write_text("[]"),
        r"problems\.json: expected an object",
    ),
    "answer out of range": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(answer=3)),
        r"problem 4: 'answer' is 3 but there are 3 choices",
    ),
    "answer below range": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(answer=-1)),
        r"problem 4: 'answer' is -1 but there are 3 choices",
    ),
    "answer no number": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(answer="beta")),
        r"problem 4: 'answer' must be a choice's number, counted from 0, but is 'beta'",
    ),
    "empty choices": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(choices=[])),
        r"problem 4: 'choices' is empty",
    ),
    "field gone": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].pop("lecture")),
        r"problem 4: 'lecture' is missing",
    ),
    "problem gone": (
        lambda root: edit_json(root / "problems.json", lambda p: p.pop("4")),
        r"pid_splits\.json: val names problem 4, which is not in .*problems\.json",
    ),
    "problem twice in a split": (
        lambda root: edit_json(root / "pid_splits.json", lambda s: s["test"].append("7")),
        r"pid_splits\.json: test names problem 7 twice; ",
    ),
    "problem twice, once as a number": (
        lambda root: edit_json(root / "pid_splits.json", lambda s: s["val"].append(4)),
        r"pid_splits\.json: val names problem 4 twice; ",
    ),
    "problem in two splits": (
        lambda root: edit_json(root / "pid_splits.json", lambda s: s["test"].append("1")),
        r"pid_splits\.json: train and test both name problem 1; ",
    ),
    "problem without an image in two splits": (
        lambda root: edit_json(root / "pid_splits.json", lambda s: s["val"].append("2")),
        r"pid_splits\.json: train and val both name problem 2; ",
    ),
    "grade no number": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(grade="g")),
        r"problem 4: 'grade' must be grade1 to grade12 but is 'g'",
    ),
    "grade without its number": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(grade="grade")),
        r"problem 4: 'grade' must be grade1 to grade12 but is 'grade'",
    ),
    "grade not written in ASCII": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(grade="grade٤")),
        r"problem 4: 'grade' must be grade1 to grade12",
    ),
    "grade of no school": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(grade="grade13")),
        r"problem 4: 'grade' must be grade1 to grade12 but is 'grade13'",
    ),
    "grade a list": (
        lambda root: edit_json(root / "problems.json", lambda p: p["4"].update(grade=["grade4"])),
        r"problem 4: 'grade' must be grade1 to grade12",
    ),
    "problem twice in the official file": (
        lambda root: (root / "problems.json").write_text(
            (root / "problems.json")
            .read_text()
            .replace('{"1":', '{"4": {}, "1":', 1)
            .replace('{"3":', '{"4": {}, "3":', 1)
        ),
        r"problems\.json: an object names '4' twice; remove one",
    ),
    "split named twice": (
        lambda root: (root / "pid_splits.json").write_text('{"train": ["1"], "val": ["4"], "test": [], "val": []}'),
        r"pid_splits\.json: an object names 'val' twice",
    ),
    "split gone": (
        lambda root: edit_json(root / "pid_splits.json", lambda s: s.pop("val")),
        r"pid_splits\.json: val: expected a list",
    ),
    "no image at all": (
        lambda root: edit_json(root / "problems.json", lambda p: [x.update(image=None) for x in p.values()]),
        r"nothing to prepare: none of 8 problems has an image",
    ),
    "wrong folder": (
        lambda root: (root / "pid_splits.json").unlink(),
        r"is not a ScienceQA folder: it has neither problems\.json with pid_splits\.json nor",
    ),
    "way out of the folder": (
        lambda root: (
            edit_json(root / "problems.json", lambda p: p.update({"../../x": p["4"]})),
            edit_json(root / "pid_splits.json", lambda s: s["val"].append("../../x")),
            shutil.copytree(root / "images/val/4", root / "x"),
        ),
        r"is outside the folder",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_source_is_one_sentence_and_leaves_nothing_behind(official_scienceqa: Path, tmp_path: Path, fault: str):
    damage, sentence = BROKEN[fault]
    damage(official_scienceqa)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(UserError, match=sentence) as error:
        scienceqa.prepare(official_scienceqa, out / "sqa")
    assert "\n" not in str(error.value)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("fault", ["truncated image", "answer out of range", "invalid JSON"])
def test_broken_source_does_not_change_an_earlier_result(prepared: Path, official_scienceqa: Path, fault: str):
    before = {path: path.read_bytes() for path in prepared.rglob("*.json")}
    # A hard link shares its content with the source: replace the source file, as a new download would.
    image = official_scienceqa / "images/val/4/image.png"
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)
    BROKEN[fault][0](official_scienceqa)
    with pytest.raises(UserError):
        scienceqa.prepare(official_scienceqa, prepared)
    assert {path: path.read_bytes() for path in prepared.rglob("*.json")} == before
    assert len(scienceqa.load(prepared, "val")) == 2


def test_disk_error_is_one_sentence_and_leaves_nothing_behind(official_scienceqa: Path, tmp_path: Path, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "link", fail)
    monkeypatch.setattr(shutil, "copyfile", fail)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"sqa cannot be written, because the disk has no room for it"):
        scienceqa.prepare(official_scienceqa, tmp_path / "out" / "sqa")
    assert list((tmp_path / "out").iterdir()) == []


def test_load_refuses_a_folder_that_was_not_prepared(tmp_path: Path):
    with pytest.raises(UserError, match=r"scienceqa_val\.json is missing\); run `blipfit prepare scienceqa"):
        scienceqa.load(tmp_path, "val")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": "(b) gamma"}, r"entry 1: 'answer' is '\(b\) gamma', which is none of \(a\) alpha, \(b\)"),
        ({"choices": []}, r"entry 1: 'choices' is empty"),
        ({"choices": ["x"] * 27}, r"entry 1: 'choices' has 27 texts; at most 26"),
        ({"context": None}, r"entry 1: 'context' must be text but is null"),
    ],
)
def test_load_refuses_a_wrong_entry(prepared: Path, change: dict, sentence: str):
    edit_json(prepared / "scienceqa_train.json", lambda entries: entries[0].update(change))
    with pytest.raises(UserError, match=sentence):
        scienceqa.load(prepared, "train")


@pytest.mark.parametrize("grade", ["grade1", "grade12", "4", 4, "", None])
def test_grades_that_prepare_accepts(official_scienceqa: Path, tmp_path: Path, grade):
    edit_json(official_scienceqa / "problems.json", lambda problems: problems["4"].update(grade=grade))
    scienceqa.prepare(official_scienceqa, tmp_path / "sqa")
    questions = scienceqa.load(tmp_path / "sqa", "val")
    assert questions[0].tags.get("grade") == (str(grade) if grade else None)
    metrics.leaderboard_columns(questions, [True, False])  # the last step of a training


def test_empty_questions_and_equal_choices_are_counted_by_prepare(official_scienceqa: Path, tmp_path: Path):
    assert scienceqa.prepare(official_scienceqa, tmp_path / "good").notes == []
    edit_json(official_scienceqa / "problems.json", lambda problems: problems["4"].update(question=" "))
    edit_json(official_scienceqa / "problems.json", lambda problems: problems["6"].update(choices=["a", "b", "a"]))
    report = str(scienceqa.prepare(official_scienceqa, tmp_path / "sqa"))
    assert "note: 1 problems with an empty question, first 4" in report
    assert "note: 1 problems with two equal choices, first 6" in report


def test_load_refuses_an_id_that_occurs_twice(prepared: Path):
    file = prepared / "scienceqa_test.json"
    before = file.read_text()
    edit_json(file, lambda entries: entries.append(entries[0]))
    with pytest.raises(UserError, match=r"scienceqa_test\.json: entries 1 and 4 both have question_id 6; remove one"):
        scienceqa.load(prepared, "test")
    file.write_text(before)
    edit_json(file, lambda entries: entries[1].update(question_id=1))  # a number here, a text in train
    for split in ("train", "test"):
        with pytest.raises(UserError, match=r"question_id 1 is in scienceqa_\w+\.json and in scienceqa_\w+\.json"):
            scienceqa.load(prepared, split)
    assert len(scienceqa.load(prepared, "val")) == 2


@pytest.mark.parametrize(
    ("tags", "sentence"),
    [
        ({"grade": "g"}, r"scienceqa_facts\.json: problem 3: 'grade' must be grade1 to grade12 but is 'g'"),
        ({"grade": 4}, r"scienceqa_facts\.json: problem 3: every tag must be text"),
        ("tags", r"scienceqa_facts\.json: problem 3: expected an object"),
    ],
)
def test_load_refuses_wrong_tags(prepared: Path, tags, sentence: str):
    edit_json(prepared / scienceqa.TAGS_FILE, lambda all_tags: all_tags.update({"3": tags}))
    with pytest.raises(UserError, match=sentence):
        scienceqa.load(prepared, "train")


def test_load_refuses_a_wrong_grade_in_the_official_file(prepared: Path, official_scienceqa: Path):
    (prepared / scienceqa.TAGS_FILE).unlink()
    shutil.copy(official_scienceqa / "problems.json", prepared)
    edit_json(prepared / "problems.json", lambda problems: problems["8"].update(grade="eight"))
    with pytest.raises(UserError, match=r"problems\.json: problem 8: 'grade' must be grade1 to grade12"):
        scienceqa.load(prepared, "val")


def write_parquet(root: Path, official: Path) -> None:
    """Write the official folder as parquet like the hub's: no problem numbers, and the images inside the rows."""
    import datasets

    text = datasets.Value("string")
    names = ("question", "hint", "task", "grade", "subject", "topic", "category", "skill", "lecture", "solution")
    features = {"image": datasets.Image(), "choices": datasets.List(text), "answer": datasets.Value("int8")}
    features |= dict.fromkeys(names, text)
    problems = json.loads((official / "problems.json").read_text())
    for split, pids in json.loads((official / "pid_splits.json").read_text()).items():
        if split == "trainval":
            continue
        rows = []
        for pid in pids:
            row = {name: problems[pid][name] for name in (*names, "choices", "answer")}
            image = official / "images" / split / pid / "image.png"
            rows.append(row | {"image": {"bytes": image.read_bytes()} if image.is_file() else None})
        hub_name = {"val": "validation"}.get(split, split)
        table = datasets.Dataset.from_list(rows, features=datasets.Features(features))
        (root / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(root / "data" / f"{hub_name}-00000-of-00001-0123456789abcdef.parquet")


def test_the_hubs_parquet_files_give_the_same_questions(prepared: Path, official_scienceqa: Path, tmp_path: Path):
    write_parquet(tmp_path / "hub_copy", official_scienceqa)
    report = scienceqa.prepare(tmp_path / "hub_copy", tmp_path / "from_hub")
    assert report.counts == {"train": 2, "val": 2, "test": 3}
    assert report.left_out == {"without an image": 1}
    assert report.images == {"written": 7}
    for split in ("train", "val", "test"):
        questions, hub_questions = scienceqa.load(prepared, split), scienceqa.load(tmp_path / "from_hub", split)
        for question, hub_question in zip(questions, hub_questions, strict=True):
            assert question.image.read_bytes() == hub_question.image.read_bytes()
            for name in ("question", "choices", "answer_index", "context", "tags"):
                assert getattr(question, name) == getattr(hub_question, name)
    assert [q.id for q in scienceqa.load(tmp_path / "from_hub", "train")] == ["train-0", "train-1"]


def test_an_incomplete_download_is_an_error(official_scienceqa: Path, tmp_path: Path):
    write_parquet(tmp_path / "hub_copy", official_scienceqa)
    next((tmp_path / "hub_copy" / "data").glob("validation-*")).unlink()
    with pytest.raises(UserError, match=r"lacks parquet files of validation \(has 0\); download it again"):
        scienceqa.prepare(tmp_path / "hub_copy", tmp_path / "sqa")
    assert not (tmp_path / "sqa").exists()


def test_real_data(shared: Path, tmp_path: Path):
    report = scienceqa.prepare(shared / "scienceqa", tmp_path / "sqa")
    assert report.counts == {"train": 120, "val": 40, "test": 40}
    assert report.left_out == {"without an image": 60}
    problems = json.loads((shared / "scienceqa" / "problems.json").read_text())
    for split in ("train", "val", "test"):
        for question in scienceqa.load(tmp_path / "sqa", split):
            record = problems[question.id]
            assert question.answer == record["choices"][record["answer"]]
            assert question.context == f"{record['hint']} {record['lecture']}"
            assert question.tags["subject"] == record["subject"]
            assert question.tags["grade"] == record["grade"]
    (tmp_path / "sqa" / scienceqa.TAGS_FILE).unlink()
    for question in scienceqa.load(
        tmp_path / "sqa", "train"
    ):  # without the tags file, the space at the start of the context tells
        assert question.tags["context"] == ("text+image" if problems[question.id]["hint"] else "image")
