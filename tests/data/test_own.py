"""The user's own data: every line is checked, errors name file and line, and no image is in two splits."""

import json
from pathlib import Path

import pytest

from blipfit.data import own
from blipfit.errors import UserError

GOOD = {"image": "a.png", "question": "Which?", "choices": ["x", "y", "z"], "answer": 1}


def write(file: Path, *records: dict | str) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture
def folder(tmp_path: Path, draw) -> Path:
    draw(tmp_path / "a.png")
    draw(tmp_path / "sub" / "b.png", 1)
    return tmp_path


def test_questions_of_every_kind(folder: Path):
    file = write(
        folder / "data.jsonl",
        GOOD,
        "",
        {"image": "sub/b.png", "question": "Who?", "choices": ["x", "y"], "answer": "y", "context": "C", "id": "q"},
        {"image": "a.png", "question": "What?", "answer": "a red kite", "id": 12},
    )
    first, second, third = own.read_questions(file)
    assert (first.id, first.answer, first.answer_index, first.context) == ("1", "y", 1, "")
    assert (second.id, second.answer, second.answer_index, second.context) == ("q", "y", 1, "C")
    assert second.image == folder / "sub" / "b.png"
    assert (third.id, third.answer, third.answer_index, third.choices) == ("12", "a red kite", None, ())


def test_a_text_is_a_choice_and_a_number_is_an_index(folder: Path):
    numbers = {"image": "a.png", "question": "How many?", "choices": ["2", "1", "0"]}
    file = write(folder / "data.jsonl", numbers | {"answer": "0"}, numbers | {"answer": 0})
    assert [question.answer for question in own.read_questions(file)] == ["0", "2"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"answer": 4}, "'answer' is 4 but there are 3 choices"),
        ({"answer": 3}, "'answer' is 3 but there are 3 choices (counted from 0)"),
        ({"answer": -1}, "'answer' is -1 but there are 3 choices"),
        ({"answer": True}, "'answer' must be a choice's number, counted from 0, but is True"),
        ({"answer": 1.0}, "'answer' must be a choice's number, counted from 0, but is 1.0"),
        ({"answer": "w"}, "'answer' is 'w', which is none of ['x', 'y', 'z']"),
        ({"choices": ["x", "x"], "answer": "x"}, "several choices read 'x'; give 'answer' as a number"),
        ({"choices": []}, "'choices' is empty"),
        ({"choices": "x, y"}, "'choices' must be a list of texts"),
        ({"choices": ["x", 2]}, "'choices' must be a list of texts"),
        ({"image": "c.png"}, "c.png is missing; paths are relative to the folder of the .jsonl file"),
        ({"image": 3}, "'image' must be text but is the number 3"),
        ({"question": None}, "'question' must be text but is null"),
        ({"contxt": "C"}, "unknown key 'contxt'; did you mean 'context'?"),
        ({"zzz": 1}, "unknown key 'zzz'; known: image, question, choices, answer, context, id"),
        ({"id": ["a"]}, "'id' must be a text or a whole number but is ['a']"),
        ({"id": "1"}, "'id' 1 is already used in line 1"),
    ],
)
def test_an_error_names_the_file_and_the_line(folder: Path, change: dict, sentence: str):
    file = write(folder / "data.jsonl", GOOD, "", GOOD | change)
    with pytest.raises(UserError) as error:
        own.read_questions(file)
    assert f"data.jsonl:3: {sentence}" in str(error.value).replace(f"image {folder}/", "")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"image": "a.png",', "data.jsonl:2: not valid JSON (Expecting property name"),
        ("[1]", "data.jsonl:2: expected an object {…} but found a list"),
        ('{"image": "a.png", "answer": "x"}', "data.jsonl:2: 'question' is missing"),
        ('{"image": "a.png", "question": "?"}', "data.jsonl:2: 'answer' is missing"),
        ('{"image": "a.png", "question": "?", "answer": 3}', "data.jsonl:2: 'answer' must be text"),
        ('{"image": "a.png", "question": "?", "answer": " "}', "data.jsonl:2: 'answer' is empty"),
    ],
)
def test_an_invalid_line_is_an_error(folder: Path, line: str, sentence: str):
    with pytest.raises(UserError) as error:
        own.read_questions(write(folder / "data.jsonl", GOOD, line))
    assert sentence in str(error.value)


def test_example_of_the_documentation(tmp_path: Path, draw):
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith('{"image": "photos/')]
    for line in lines:
        draw(tmp_path / json.loads(line)["image"])
    closed, opened = own.read_questions(write(tmp_path / "data.jsonl", *lines))
    assert (closed.answer, opened.answer, opened.id) == ("a plate", "a red kite", "k")


def test_byte_order_mark_and_windows_line_ends_are_read(folder: Path):
    (folder / "data.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(own.read_questions(folder / "data.jsonl")) == 1


def test_text_may_hold_unusual_line_separators(folder: Path):
    file = folder / "data.jsonl"
    file.write_text(json.dumps(GOOD | {"question": "one\u2028two\x0bthree"}, ensure_ascii=False) + "\n")
    assert own.read_questions(file)[0].question == "one\u2028two\x0bthree"


def test_prepare_a_folder_with_splits(folder: Path, tmp_path: Path):
    source = folder
    for split in ("train", "val", "test"):
        write(source / f"{split}.jsonl", GOOD, {"image": "sub/b.png", "question": "What?", "answer": "a kite"})
    report = own.prepare(source, tmp_path / "out")
    assert report.counts == {"train": 2, "val": 2, "test": 2}
    assert sum(report.images.values()) == 2
    for split in ("train", "val", "test"):
        before, after = own.load(source, split), own.load(tmp_path / "out", split)
        for original, prepared in zip(before, after, strict=True):
            for name in ("id", "question", "answer", "answer_index", "choices"):
                assert getattr(original, name) == getattr(prepared, name)
            assert prepared.image.is_relative_to(tmp_path / "out")
            assert original.image.read_bytes() == prepared.image.read_bytes()


def test_images_from_outside_the_folder_are_added(tmp_path: Path, draw):
    source = tmp_path / "lists"
    source.mkdir()
    photos = [draw(tmp_path / name / "photo.png", n) for n, name in enumerate(("one", "two", "three"))]
    paths = [str(photos[0]), "../two/photo.png", "../three/photo.png"]
    write(source / "data.jsonl", *(GOOD | {"image": path} for path in paths))
    own.prepare(source / "data.jsonl", tmp_path / "out")
    questions = [q for split in ("train", "val", "test") for q in own.load(tmp_path / "out", split)]
    assert {q.image.read_bytes() for q in questions} == {path.read_bytes() for path in photos}


def test_one_file_is_split_by_image(tmp_path: Path, draw):
    for number in range(20):
        draw(tmp_path / f"{number}.png", number)
    records = [GOOD | {"image": f"{n}.png", "question": q} for q in ("A?", "B?") for n in range(20)]
    report = own.prepare(write(tmp_path / "data.jsonl", *records), tmp_path / "out")
    assert report.counts == {"train": 32, "val": 4, "test": 4}
    splits = {s: {q.image.name for q in own.load(tmp_path / "out", s)} for s in ("train", "val", "test")}
    assert len(splits["train"] | splits["val"] | splits["test"]) == 20
    own.prepare(tmp_path / "data.jsonl", tmp_path / "again")
    for split, names in splits.items():
        assert {q.image.name for q in own.load(tmp_path / "again", split)} == names


def test_too_few_images_to_split(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match="has 1 images, too few for train, val and test"):
        own.prepare(write(folder / "data.jsonl", GOOD), tmp_path / "out")


@pytest.mark.parametrize("fault", ["image", "line"])
def test_an_invalid_source_writes_nothing(folder: Path, fault: str):
    for split in ("train", "val", "test"):
        write(folder / f"{split}.jsonl", GOOD)
    if fault == "image":
        (folder / "a.png").write_bytes((folder / "a.png").read_bytes()[:100])
    else:
        write(folder / "test.jsonl", GOOD | {"answer": 9})
    with pytest.raises(UserError):
        own.prepare(folder, folder / "build" / "out")
    assert not (folder / "build").exists()


def test_folder_without_splits_says_what_it_needs(tmp_path: Path):
    with pytest.raises(UserError, match=r"give a \.jsonl file, or a folder with train\.jsonl, val\.jsonl, test"):
        own.prepare(tmp_path, tmp_path / "out")
    with pytest.raises(UserError, match=r"val\.jsonl is missing; own data is a folder with train\.jsonl"):
        own.load(tmp_path, "val")
