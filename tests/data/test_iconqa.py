"""IconQA: the official archive is converted to the published annotation files, byte by byte."""

import json
import os
import shutil
from pathlib import Path

import pytest

from blipfit.data import iconqa
from blipfit.errors import UserError

PUBLISHED_TRAIN = """[
    {
        "question": "What time is it?",
        "choices": [
            "6:00 A.M.",
            "6:00 P.M.",
            "naïve"
        ],
        "answer": 1,
        "ques_type": "choose_txt",
        "grade": "grade2",
        "label": "Q7",
        "split": "train",
        "id": "7"
    }
]"""


def edit_json(file: Path, change) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


@pytest.fixture
def prepared(official_iconqa: Path, tmp_path: Path) -> Path:
    iconqa.prepare(official_iconqa, tmp_path / "iconqa")
    return tmp_path / "iconqa"


def test_annotation_file_is_the_published_one_to_the_byte(prepared: Path):
    assert (prepared / "annotations" / "train.json").read_bytes() == PUBLISHED_TRAIN.encode()


def test_other_types_are_left_out_and_counted(official_iconqa: Path, tmp_path: Path):
    report = iconqa.prepare(official_iconqa, tmp_path / "iconqa")
    assert report.counts == {"train": 1, "val": 1, "test": 1}
    assert report.left_out == {"of type choose_img": 1, "of type fill_in_blank": 1}
    assert "left out: 1 of type fill_in_blank" in str(report)


def test_load(prepared: Path):
    (question,) = iconqa.load(prepared, "train")
    assert question.id == "7"
    assert question.image == prepared / "train/choose_txt/7/image.png"
    assert question.choices == ("6:00 A.M.", "6:00 P.M.", "naïve")
    assert (question.answer, question.answer_index) == ("6:00 P.M.", 1)
    assert question.tags == {"grade": "grade2", "label": "Q7"}


def test_archive_with_its_inner_folder_is_read_the_same(official_iconqa: Path, prepared: Path, tmp_path: Path):
    inner = official_iconqa / "iconqa"
    inner.mkdir()
    for split in ("train", "val", "test"):
        (official_iconqa / split).rename(inner / split)
    iconqa.prepare(official_iconqa.parent, tmp_path / "again")  # the parent of the archive's folder is accepted too
    assert (tmp_path / "again/annotations/val.json").read_bytes() == (prepared / "annotations/val.json").read_bytes()


def test_folder_of_the_published_experiments_loads_unchanged(prepared: Path, tmp_path: Path):
    # An earlier version of that folder has the images in iconqa/iconqa/SPLIT/choose_txt.
    (prepared / "iconqa").mkdir()
    (prepared / "val").rename(prepared / "iconqa" / "val")
    assert iconqa.load(prepared, "val")[0].image == prepared / "iconqa/val/choose_txt/9/image.png"


def test_number_as_id_is_read_as_text(prepared: Path):
    edit_json(prepared / "annotations/train.json", lambda entries: entries[0].update(id=7))
    assert iconqa.load(prepared, "train")[0].id == "7"


BROKEN = {
    "missing image": (
        lambda root: (root / "train/choose_txt/7/image.png").unlink(),
        r"problem 7: its image is missing \(looked for .*train/choose_txt/7/image\.png and .*; unpack https",
    ),
    "truncated image": (
        lambda root: (root / "train/choose_txt/7/image.png").write_bytes(b"\x89PNG\r\n\x1a\n"),
        r"7/image\.png is damaged or not an image",
    ),
    "invalid JSON": (
        lambda root: (root / "problems.json").write_text('{"7": {},\n}'),
        r"problems\.json:\d: not valid JSON",
    ),
    "answer out of range": (
        lambda root: edit_json(root / "problems.json", lambda p: p["7"].update(answer=3)),
        r"problem 7: 'answer' is 3 but there are 3 choices",
    ),
    "empty choices": (
        lambda root: edit_json(root / "problems.json", lambda p: p["7"].update(choices=[])),
        r"problem 7: 'choices' is empty",
    ),
    "unknown split": (
        lambda root: edit_json(root / "problems.json", lambda p: p["7"].update(split="dev")),
        r"problem 7: 'split' is 'dev', which is none of train, val, test",
    ),
    "no choose_txt problem": (
        lambda root: edit_json(root / "problems.json", lambda p: [p.pop(k) for k in ("7", "9", "12")]),
        r"has no problem of type choose_txt",
    ),
    "wrong folder": (
        lambda root: (root / "problems.json").unlink(),
        r"is not an IconQA folder \(problems\.json is missing\); unpack https://\S+iconqa_data\.zip",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_broken_source_is_one_sentence_and_leaves_nothing_behind(official_iconqa: Path, tmp_path: Path, fault: str):
    damage, sentence = BROKEN[fault]
    damage(official_iconqa)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=sentence) as error:
        iconqa.prepare(official_iconqa, tmp_path / "out" / "iconqa")
    assert "\n" not in str(error.value)
    assert list((tmp_path / "out").iterdir()) == []


def test_hub_is_refused_with_the_official_address(tmp_path: Path):
    with pytest.raises(UserError, match=r"lacks the train split\); unpack https://\S+iconqa_data\.zip"):
        iconqa.prepare("hub", tmp_path / "iconqa")


def test_load_refuses_a_folder_that_was_not_prepared(official_iconqa: Path):
    with pytest.raises(UserError, match=r"annotations/val\.json is missing\); run `blipfit prepare iconqa"):
        iconqa.load(official_iconqa, "val")


def test_an_id_that_occurs_twice_is_refused(prepared: Path):
    file = prepared / "annotations" / "train.json"
    edit_json(file, lambda entries: entries.append(dict(entries[0])))
    with pytest.raises(UserError, match=r"train\.json: entries 1 and 2 both have id 7"):
        iconqa.load(prepared, "train")


def test_prepared_folder_outlives_its_source(prepared: Path, official_iconqa: Path):
    shutil.rmtree(official_iconqa)
    assert iconqa.load(prepared, "test")[0].image.stat().st_size


def test_real_data(shared: Path, tmp_path: Path):
    report = iconqa.prepare(shared / "iconqa", tmp_path / "iconqa")
    assert report.counts == {"train": 24, "val": 8, "test": 8}
    assert report.left_out == {"of type choose_img": 40, "of type fill_in_blank": 40}
    problems = json.loads((shared / "iconqa" / "problems.json").read_text())
    for question in iconqa.load(tmp_path / "iconqa", "train"):
        assert question.answer == problems[question.id]["choices"][problems[question.id]["answer"]]


def test_disk_error_over_an_earlier_result_leaves_its_annotations(prepared: Path, official_iconqa: Path, monkeypatch):
    before = (prepared / "annotations/train.json").read_bytes()
    edit_json(official_iconqa / "problems.json", lambda problems: problems["7"].update(answer=0))
    for image in official_iconqa.rglob("*.png"):  # new files instead of the linked ones, so that they are added again
        content = image.read_bytes()
        image.unlink()
        image.write_bytes(content)
    replace = os.replace

    def fail_for_images(source: Path, target: Path) -> None:
        if Path(target).suffix == ".png":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_images)
    with pytest.raises(UserError, match="the disk has no room for it"):
        iconqa.prepare(official_iconqa, prepared)
    assert (prepared / "annotations/train.json").read_bytes() == before
