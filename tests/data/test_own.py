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


def test_images_from_outside_the_folder_are_copied_if_that_is_allowed(tmp_path: Path, draw):
    source = tmp_path / "lists"
    source.mkdir()
    photos = [draw(tmp_path / name / "photo.png", n) for n, name in enumerate(("one", "two", "three"))]
    paths = [str(photos[0]), "../two/photo.png", "../three/photo.png"]
    write(source / "data.jsonl", *(GOOD | {"image": path} for path in paths))
    report = own.prepare(source / "data.jsonl", tmp_path / "out", allow_outside=True)
    assert report.images == {"copied from outside the data folder": 3}
    questions = [q for split in ("train", "val", "test") for q in own.load(tmp_path / "out", split)]
    assert {q.image.read_bytes() for q in questions} == {path.read_bytes() for path in photos}
    assert {path.stat().st_nlink for path in photos} == {1}


@pytest.mark.parametrize("way", ["absolute", "dots", "link", "folder link", "hidden dots"])
def test_an_image_from_outside_the_folder_is_refused(tmp_path: Path, draw, way: str):
    outside = draw(tmp_path / "outside" / "private.png", 9)
    source = tmp_path / "lists"
    for number in range(3):
        draw(source / f"{number}.png", number)
    (source / "link.png").symlink_to(outside)
    (source / "photos").symlink_to(outside.parent)
    path = {
        "absolute": str(outside),
        "dots": "../outside/private.png",
        "link": "link.png",
        "folder link": "photos/private.png",
        "hidden dots": "photos/../outside/private.png",
    }[way]
    write(source / "data.jsonl", *(GOOD | {"image": f"{n}.png"} for n in range(3)), GOOD | {"image": path})
    with pytest.raises(UserError, match=r"data\.jsonl:4: .*private\.png.*--allow-outside"):
        own.prepare(source / "data.jsonl", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert outside.stat().st_nlink == 1


def test_links_and_other_paths_inside_the_folder_are_allowed(tmp_path: Path, draw):
    for number in range(3):
        draw(tmp_path / "photos" / f"{number}.png", number)
    (tmp_path / "link.png").symlink_to("photos/0.png")
    paths = ["photos/0.png", "photos/../photos/0.png", "link.png", str(tmp_path / "photos/0.png")]
    paths += ["photos/1.png", "photos/2.png"]
    own.prepare(write(tmp_path / "data.jsonl", *(GOOD | {"image": path} for path in paths)), tmp_path / "out")
    assert sorted(f.relative_to(tmp_path / "out").as_posix() for f in (tmp_path / "out").rglob("*.png")) == [
        "link.png",
        "photos/0.png",
        "photos/1.png",
        "photos/2.png",
    ]
    assert not (tmp_path / "out" / "link.png").is_symlink()
    assert sorted(len(own.load(tmp_path / "out", split)) for split in ("train", "val", "test")) == [1, 1, 4]


def test_copies_of_an_image_stay_in_one_split(tmp_path: Path, draw):
    from PIL import Image

    records = []
    for number in range(12):
        image = draw(tmp_path / f"{number}.png", number)
        with Image.open(image) as opened:
            opened.save(tmp_path / f"saved-again-{number}.bmp")
        (tmp_path / f"copy-{number}.png").write_bytes(image.read_bytes())
        (tmp_path / f"hard-{number}.png").hardlink_to(image)
        (tmp_path / f"soft-{number}.png").symlink_to(image)
        names = (f"{number}.png", f"saved-again-{number}.bmp", *(f"{k}-{number}.png" for k in ("copy", "hard", "soft")))
        records += [GOOD | {"image": name} for name in (*names, str(image), f"../{tmp_path.name}/{number}.png")]
    report = own.prepare(write(tmp_path / "data.jsonl", *records), tmp_path / "out")
    assert report.counts == {"train": 70, "val": 7, "test": 7}
    numbers = {
        split: {q.image.stem.split("-")[-1] for q in own.load(tmp_path / "out", split)}
        for split in ("train", "val", "test")
    }
    assert sum(len(part) for part in numbers.values()) == 12
    # Names and order of the lines do not matter.
    for number in range(12):
        (tmp_path / f"{number}.png").rename(tmp_path / f"renamed-{number}.png")
    renamed = [GOOD | {"image": f"renamed-{n}.png"} for n in reversed(range(12))]
    own.prepare(write(tmp_path / "data.jsonl", *renamed), tmp_path / "again")
    for split, part in numbers.items():
        assert {q.image.stem.split("-")[-1] for q in own.load(tmp_path / "again", split)} == part


def test_an_image_in_two_given_splits_is_noted(folder: Path, tmp_path: Path, draw):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    for split, image in (("train", "a.png"), ("val", "copy.png"), ("test", "sub/b.png")):
        write(folder / f"{split}.jsonl", GOOD | {"image": image})
    assert "note: 1 images are in more than one split" in str(own.prepare(folder, tmp_path / "out"))


def bad_lines(folder: Path) -> list[dict | str]:
    """One line of every kind of mistake."""
    (folder / "empty.png").touch()
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:60])
    return [
        '{"image": ',
        json.dumps(GOOD) + ",",
        json.dumps(GOOD | {"question": "\ud83d"}),
        "[" * 100_000,
        '{"answer": ' + "9" * 5000 + "}",
        GOOD | {"answer": 10**500},
        GOOD | {"contxt": ""},
        GOOD | {"image": "none.png"},
        GOOD | {"image": "https://example.org/a.jpg"},
        GOOD | {"image": "data:image/png;base64," + "A" * 5000},
        GOOD | {"image": "a\0.png"},
        GOOD | {"image": "x" * 300},
        GOOD | {"image": "/dev/zero"},
        GOOD | {"image": "/proc/kmsg"},
        GOOD | {"image": "empty.png"},
        GOOD | {"image": "cut.png"},
    ]


def test_bad_entries_are_left_out_and_listed(tmp_path: Path, draw):
    good = [GOOD | {"image": draw(tmp_path / f"{n}.png", n).name, "id": f"good {n}"} for n in range(6)]
    draw(tmp_path / "a.png", 9)
    bad = bad_lines(tmp_path)
    lines = [*good[:3], *bad, *good[3:], GOOD | {"id": "good 1"}]
    report = own.prepare(write(tmp_path / "data.jsonl", *lines), tmp_path / "out", skip_bad=True)
    assert sum(report.counts.values()) == 6
    numbers = [*range(4, 4 + len(bad)), len(lines)]
    assert sorted(int(entry.split("data.jsonl:")[1].split(":")[0]) for entry in report.bad) == numbers
    assert all(len(entry) < 600 for entry in report.bad)
    assert (tmp_path / "out" / "left_out.txt").read_text().splitlines() == list(report.bad)
    assert f"left out: {len(bad) + 1} bad entries" in str(report)
    assert not any("none.png" in str(file) for file in (tmp_path / "out").rglob("*"))


def test_every_bad_entry_is_an_error_otherwise(tmp_path: Path, draw):
    good = [GOOD | {"image": draw(tmp_path / f"{n}.png", n).name} for n in range(3)]
    draw(tmp_path / "a.png", 9)
    for line in bad_lines(tmp_path):
        with pytest.raises(UserError, match=r"data\.jsonl:4: ") as error:
            own.prepare(write(tmp_path / "data.jsonl", *good, line), tmp_path / "out")
        assert len(str(error.value)) < 600
        assert not (tmp_path / "out").exists()


def test_only_bad_entries_are_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"no entry that can be used; the first error: .*data\.jsonl:1"):
        own.prepare(write(tmp_path / "data.jsonl", GOOD, "{}"), tmp_path / "out", skip_bad=True)


def test_a_long_list_of_bad_entries_is_cut_in_the_report(tmp_path: Path, draw):
    good = [GOOD | {"image": draw(tmp_path / f"{n}.png", n).name} for n in range(3)]
    report = own.prepare(write(tmp_path / "data.jsonl", *good, *["{}"] * 30), tmp_path / "out", skip_bad=True)
    assert str(report).count("data.jsonl:") == 20
    assert "and 10 more: " in str(report)


def test_transparency_is_shown_on_white(tmp_path: Path, draw):
    draw(tmp_path / "a.png")
    assert own.read_questions(write(tmp_path / "data.jsonl", GOOD))[0].transparency == "white"


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
    with pytest.raises(UserError, match="has 1 different images, too few for train, val and test"):
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
