"""Hostile annotation files of every data set are read or refused with a UserError, and nothing is half written."""

import contextlib
import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from PIL import Image

from blipfit import data
from blipfit.data import annotations
from blipfit.data.question import SPLITS
from blipfit.evaluation import mme_scores, rewardbench_scores
from hostile_inputs import changed, changed_bytes, is_user_error, json_files, json_lines, texts

OWN = [
    {"image": "a.png", "question": "What?", "answer": "x", "id": "1", "context": "Here."},
    {"image": "b.png", "question": "Which?", "choices": ["red", "blue"], "answer": 1},
    {"image": "sub/c.png", "question": "Which?", "choices": ["red", "blue"], "answer": "red", "id": 7},
    {"image": "d.png", "question": "", "answer": "y"},
]
PAIRS = [
    {
        "id": f"RLAIF-{number}",
        "query": "Describe <image>.",
        "response": [f"A {number}.", "B."],
        "human_ranking": [number % 2, 1 - number % 2],
        "image": f"pairs/{number}.png" if number else None,
        "models": ["m", "n"],
    }
    for number in range(11)
]
JUDGMENTS = [
    {
        "id": "RLAIF-1",
        "query": "q",
        "response": ["a", "b"],
        "ranking": [0, 1],
        "meta": {"filter_choice": "Overall Judgment: Answer 1 is better.", "random_number": 1},
    },
    {"0": None},
]
SCIENCEQA = {
    str(number): {
        "question": f"Question {number}?",
        "choices": ["alpha", "beta"],
        "answer": number % 2,
        "hint": "",
        "image": "image.png",
        "grade": "grade3",
        "subject": "natural science",
        "lecture": "Lecture.",
    }
    for number in (1, 2, 3)
}
SCIENCEQA_SPLITS = {"train": ["1"], "val": ["2"], "test": ["3"]}
ICONQA = {
    str(number): {
        "question": "What time is it?",
        "choices": ["6", "7"],
        "answer": 1,
        "ques_type": "choose_txt",
        "grade": "grade2",
        "label": "Q7",
        "split": split,
    }
    for number, split in zip((7, 9, 12), SPLITS, strict=True)
}
MME_LINES = ["a.png\tIs it red?\tYes", "a.png\tIs it blue?\tNo", "b.png\tIs it red?\tNo", "b.png\tIs it new?\tYes"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder with the images that all valid files name."""
    folder = tmp_path / "source"
    places = {"a.png": "red", "b.png": "blue", "sub/c.png": "lime", "d.png": "gray"}
    places |= {f"pairs/{number}.png": f"#{number:02x}0000" for number in range(1, 11)}
    for number, split in enumerate(SPLITS, start=1):
        places[f"images/{split}/{number}/image.png"] = f"#0000{number:02x}"
        places[f"{split}/choose_txt/{(7, 9, 12)[number - 1]}/image.png"] = f"#00{number:02x}00"
    for subtask in ("existence", "count"):
        places |= {f"{subtask}/a.png": "red", f"{subtask}/b.png": "blue"}
    for name, color in places.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), color).save(folder / name)
    return folder


def check_prepare(name: str, source: Path, **options: Any) -> None:
    """Prepare and load a data set. After a refusal the folder of the output is as before, also if it was there."""
    parent = source.parents[0 if source.is_dir() else 1]
    to = parent / "prepared"
    is_refused = is_user_error(lambda: data.prepare(name, source, to, **options))
    assert sorted(path.name for path in parent.iterdir()) == (["source"] if is_refused else ["prepared", "source"])
    if not is_refused:
        load_splits(name, to)
        before = {path: path.stat().st_mtime_ns for path in to.rglob("*")}
        if is_user_error(lambda: data.prepare(name, source, to, **options)):
            assert {path: path.stat().st_mtime_ns for path in to.rglob("*")} == before
        shutil.rmtree(to)


def load_splits(name: str, folder: Path) -> None:
    """Load every split, or refuse it."""
    for split in SPLITS:
        is_user_error(partial(data.load, name, folder, split))


def test_any_json_is_read_or_refused(for_all, tmp_path):
    file = tmp_path / "file.json"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        is_user_error(lambda: annotations.read_json(file))
        is_user_error(lambda: list(annotations.read_lines(file)))

    for_all(100, check, json_files(OWN) | json_lines(OWN) | st.binary(max_size=40))


def test_own_data(for_all, images):
    file = images / "my.jsonl"

    def check(content: bytes, skip_bad: bool) -> None:
        file.write_bytes(content)
        check_prepare("own", file, skip_bad=skip_bad)

    for_all(60, check, json_lines(OWN), st.booleans())


def test_scienceqa(for_all, images):
    def check(problems: bytes, splits: bytes) -> None:
        (images / "problems.json").write_bytes(problems)
        (images / "pid_splits.json").write_bytes(splits)
        check_prepare("scienceqa", images)

    valid = st.just(json.dumps(SCIENCEQA_SPLITS).encode())
    for_all(50, check, json_files(SCIENCEQA), valid | valid | json_files(SCIENCEQA_SPLITS))


def test_iconqa(for_all, images):
    def check(problems: bytes) -> None:
        (images / "problems.json").write_bytes(problems)
        check_prepare("iconqa", images)

    for_all(40, check, json_files(ICONQA))


def test_rewardbench(for_all, images):
    def check(content: bytes) -> None:
        (images / "test.jsonl").write_bytes(content)
        check_prepare("rewardbench", images)

    for_all(60, check, json_lines(PAIRS))


@st.composite
def tables(draw: st.DrawFn, lines: list[str]) -> bytes:
    """A tab-separated file with faults in its cells, lines or bytes."""
    rows = draw(changed([line.split("\t") for line in lines]))
    cells = [row if isinstance(row, list) else [row] for row in (rows if isinstance(rows, list) else [rows])]
    text = draw(st.sampled_from(["\n", "\n", "\r\n"])).join("\t".join(map(str, row)) for row in cells)
    content = text.encode("utf-8", "surrogatepass") + draw(st.sampled_from([b"", b"\n"]))
    return draw(st.one_of(st.just(content), st.just(content), changed_bytes(content)))


def test_mme_files(for_all, images):
    def check(content: bytes) -> None:
        (images / "existence.txt").write_bytes(content)
        check_prepare("mme", images)

    for_all(60, check, tables(MME_LINES))


def test_mme_tree(for_all, images):
    def check(content: bytes, name: str) -> None:
        file = images / "existence" / f"{name}.txt"
        file.write_bytes(content)
        check_prepare("mme", images)
        file.unlink()

    names = st.sampled_from(["a", "b", "c", "[b]", "\x1b[31m", "\udcff", "x" * 250])
    for_all(40, check, tables([line.partition("\t")[2] for line in MME_LINES[:2]]), names)


def check_scores(read: Callable[[], Any]) -> None:
    """A benchmark's scores are a record that can be written, or the answers are refused."""
    if not is_user_error(read):
        json.dumps(read(), allow_nan=False, ensure_ascii=False).encode()


def test_mme_answers(for_all, tmp_path):
    def check(content: bytes) -> None:
        (tmp_path / "count.txt").write_bytes(content)
        check_scores(lambda: mme_scores.score_mme(tmp_path))

    for_all(60, check, tables([f"{line}\tyes" for line in MME_LINES]))


def test_rewardbench_judgments(for_all, tmp_path):
    file = tmp_path / "judgments.jsonl"

    def check(content: bytes) -> None:
        file.write_bytes(content)
        check_scores(lambda: rewardbench_scores.score_rewardbench(file))

    for_all(60, check, json_lines(JUDGMENTS))


@pytest.mark.parametrize("name", ["own", "scienceqa", "iconqa", "rewardbench", "mme"])
def test_a_prepared_folder(for_all, images, tmp_path, name):
    sources = {"own": images / "my.jsonl"}
    (images / "my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in OWN))
    (images / "problems.json").write_text(json.dumps(SCIENCEQA if name == "scienceqa" else ICONQA))
    (images / "pid_splits.json").write_text(json.dumps(SCIENCEQA_SPLITS))
    if name == "rewardbench":
        (images / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in PAIRS))
    (images / "existence.txt").write_text("\n".join(MME_LINES))
    to = tmp_path / "prepared"
    data.prepare(name, sources.get(name, images), to)
    files = sorted(path for path in to.rglob("*") if path.suffix in (".json", ".jsonl", ".txt"))
    valid = {file: file.read_bytes() for file in files}

    def check(changes: tuple[Path, bytes]) -> None:
        file, content = changes
        file.write_bytes(content)
        load_splits(name, to)
        file.write_bytes(valid[file])

    def contents(file: Path) -> st.SearchStrategy[tuple[Path, bytes]]:
        if file.suffix == ".json":
            return st.tuples(st.just(file), json_files(json.loads(valid[file])))
        if file.suffix == ".jsonl":
            return st.tuples(st.just(file), json_lines([json.loads(line) for line in valid[file].splitlines()]))
        return st.tuples(st.just(file), tables(valid[file].decode().splitlines()))

    for_all(30, check, st.sampled_from(files).flatmap(contents))


def test_a_file_name_of_the_data(for_all, images, tmp_path):
    """Images with odd names are prepared, or refused; none is written outside the folder."""
    picture = (images / "a.png").read_bytes()

    def check(name: str) -> None:
        folder = images / "odd"
        folder.mkdir()
        with contextlib.suppress(OSError, ValueError):  # names that no file can have
            (folder / name).write_bytes(picture)
        lines = [*OWN, {"image": f"odd/{name}", "question": "q", "answer": "a"}]
        (images / "my.jsonl").write_text("".join(json.dumps(record) + "\n" for record in lines))
        check_prepare("own", images / "my.jsonl")
        shutil.rmtree(folder)

    for_all(50, check, texts().filter(lambda name: "/" not in name))
