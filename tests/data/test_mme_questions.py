"""MME's questions from every layout: the official tree, three-column files, the hub's parquet, the prepared folder."""

from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from blipfit import data
from blipfit.data import icons, mme
from blipfit.data.images import open_image
from blipfit.errors import UserError


@pytest.fixture
def tree(tmp_path: Path, draw: Callable[..., Path]) -> Path:
    """The official archive: one subtask with images and texts side by side, one with two subfolders."""
    root = tmp_path / "MME_Benchmark_release_version"
    for number, name in enumerate(("0002", "0001")):
        draw(root / "code_reasoning" / f"{name}.png", number)
        text = f"Is a code shown in {name}?\tYes\nIs it C in {name}?\tNo\n"
        (root / "code_reasoning" / f"{name}.txt").write_text(text)
    draw(root / "artwork" / "images" / "10002.jpg", 7)
    (root / "artwork" / "questions_answers_YN").mkdir()
    text = "Is it a painting?\tYes\nIs it glassware?\tNo"
    (root / "artwork" / "questions_answers_YN" / "10002.txt").write_text(text)
    return root


def fields(questions: list) -> list[tuple]:
    return [(q.id, q.question, q.answer, q.tags["subtask"], q.tags["file"]) for q in questions]


EXPECTED = [
    ("artwork/10002.jpg/1", "Is it a painting?", "Yes", "artwork", "10002.jpg"),
    ("artwork/10002.jpg/2", "Is it glassware?", "No", "artwork", "10002.jpg"),
    ("code_reasoning/0001.png/1", "Is a code shown in 0001?", "Yes", "code_reasoning", "0001.png"),
    ("code_reasoning/0001.png/2", "Is it C in 0001?", "No", "code_reasoning", "0001.png"),
    ("code_reasoning/0002.png/1", "Is a code shown in 0002?", "Yes", "code_reasoning", "0002.png"),
    ("code_reasoning/0002.png/2", "Is it C in 0002?", "No", "code_reasoning", "0002.png"),
]


def test_official_tree_with_and_without_its_wrapper(tree: Path):
    assert fields(mme.read_questions(tree)) == EXPECTED
    assert fields(mme.read_questions(tree.parent)) == EXPECTED
    assert mme.read_questions(tree)[0].image == tree / "artwork" / "images" / "10002.jpg"


def test_prepared_folder_holds_the_same_questions_and_pictures(tree: Path, tmp_path: Path):
    report = mme.prepare(tree, tmp_path / "mme")
    assert report.counts == {"test": 6}
    assert "part of the whole set, which has 2374 test" in str(report)
    assert "note: not the MME benchmark: number of questions: artwork 2 of 400, code_reasoning 4 of 40" in str(report)
    prepared = data.load("mme", tmp_path / "mme", "test")
    assert fields(prepared) == EXPECTED
    for before, after in zip(mme.read_questions(tree), prepared, strict=True):
        assert before.image.read_bytes() == after.image.read_bytes()
    assert (tmp_path / "mme" / "artwork.txt").read_text() == (
        "10002.jpg\tIs it a painting?\tYes\n10002.jpg\tIs it glassware?\tNo\n"
    )
    mme.prepare(tree, tmp_path / "mme")  # a second time, into its own folder


def test_three_column_files_with_images_in_another_folder(tree: Path, tmp_path: Path):
    mme.prepare(tree, tmp_path / "mme")
    (tmp_path / "questions").mkdir()
    for file in (tmp_path / "mme").glob("*.txt"):
        file.rename(tmp_path / "questions" / file.name)
    assert fields(mme.read_questions(tmp_path / "questions", images=tree)) == EXPECTED
    with pytest.raises(UserError, match=r"artwork.txt:1: its image is missing"):
        mme.read_questions(tmp_path / "questions")


def test_the_icons_data_set_is_read(tmp_path: Path):
    icons.write_mme(tmp_path / "icons", n=3)
    questions = mme.read_questions(tmp_path / "icons")
    assert [q.tags["subtask"] for q in questions[::6]] == ["existence", "count", "position", "color"]
    assert {q.answer for q in questions} == {"Yes", "No"}
    assert open_image(questions[0].image).size == (64, 64)


def write_parquet(folder: Path, rows: list[dict]) -> Path:
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    texts = [(name, pyarrow.string()) for name in ("question_id", "question", "answer", "category")]
    table = pyarrow.Table.from_pylist(rows, schema=pyarrow.schema([*texts, ("image", image)]))
    (folder / "data").mkdir(parents=True)
    half = len(rows) // 2
    for part, name in ((table[:half], "00000"), (table[half:], "00001")):
        pyarrow.parquet.write_table(part, folder / "data" / f"test-{name}-of-00002-a25dbe3b44c4fda6.parquet")
    return folder


@pytest.fixture
def hub_rows(tree: Path) -> list[dict]:
    """Rows like the hub's: the two questions of an image are not consecutive, and each row has the image."""
    questions = mme.read_questions(tree)
    return [
        {
            "question_id": f"{q.tags['subtask']}/{q.tags['file']}",
            "image": {"bytes": q.image.read_bytes(), "path": q.tags["file"]},
            "question": q.question,
            "answer": q.answer,
            "category": q.tags["subtask"],
        }
        for q in [*questions[::2], *questions[1::2]]
    ]


def test_hub_rows_become_pairs(hub_rows: list[dict], tmp_path: Path):
    report = mme.prepare(write_parquet(tmp_path / "download", hub_rows), tmp_path / "mme")
    assert fields(data.load("mme", tmp_path / "mme", "test")) == EXPECTED
    assert report.images == {"written": 3}
    assert report.notes == mme.prepare(tmp_path / "mme", tmp_path / "again").notes
    assert len(report.notes) == 2


def test_equal_truths_are_said_by_prepare(tree: Path, tmp_path: Path):
    (tree / "code_reasoning" / "0001.txt").write_text("Is it C?\tNo\nIs it Python?\tNo\n")
    report = mme.prepare(tree, tmp_path / "mme")
    assert "not the MME benchmark: code_reasoning: images with two equal truths: 1, first 0001.png" in str(report)


def test_the_published_counts_add_up():
    assert tuple(mme.PUBLISHED_COUNTS) == mme.SUBTASKS
    assert sum(mme.PUBLISHED_COUNTS.values()) == mme.PUBLISHED["test"]


def test_an_invalid_hub_row_is_an_error_and_writes_nothing(hub_rows: list[dict], tmp_path: Path):
    for number, (change, message) in enumerate(
        (
            (lambda rows: rows.pop(), r"code_reasoning/0002.png has 1 questions, but MME has two"),
            (lambda rows: rows[0].update(category="ocr"), r"row 0: 'category' is 'ocr', which is none of existence"),
            (lambda rows: rows[1].update(answer="maybe"), r"row 1: the ground truth must be Yes or No but is 'maybe'"),
            (lambda rows: rows[0].update(image=None), r"row 0: its image is missing"),
            (lambda rows: rows[0].update(image={"bytes": b"no", "path": ""}), r"row 0 is damaged or not an image"),
        )
    ):
        rows = [dict(row) for row in hub_rows]
        change(rows)
        source = write_parquet(tmp_path / str(number), rows)
        with pytest.raises(UserError, match=message):
            mme.prepare(source, tmp_path / "mme")
        assert not (tmp_path / "mme").exists()


def test_mistakes_are_errors_that_name_the_line(tree: Path, tmp_path: Path):
    with pytest.raises(UserError, match="does not contain MME"):
        mme.read_questions(tmp_path / "nowhere")
    with pytest.raises(UserError, match="it has the split test, not train"):
        data.load("mme", tree, "train")
    text = tree / "code_reasoning" / "0001.txt"
    for content, message in (
        ("Is it?\tYes\n", r"0001.txt: 1 questions, but MME has two"),
        ("Is it? Yes\nIs it?\tNo\n", r"0001.txt:1: a line must have 2 columns .*question, Yes\|No.* has 1"),
        ("Is it?\tYes\nIs it?\tperhaps\n", r"0001.txt:2: the ground truth must be Yes or No"),
    ):
        text.write_text(content)
        with pytest.raises(UserError, match=message):
            mme.read_questions(tree)
    text.write_text("Is it?\tYes\nIs it?\tNo\n")
    (tree / "code_reasoning" / "0001.png").unlink()
    with pytest.raises(UserError, match=r"0001.txt: its image is missing"):
        mme.read_questions(tree)
    (tmp_path / "count.txt").write_text("a.png\tQ?\tYes\nb.png\tQ?\tNo\n")
    with pytest.raises(UserError, match=r"count.txt:1: this line names a.png and the next b.png"):
        mme.read_questions(tmp_path)


def test_real_questions_have_two_lines_per_image(shared: Path):
    total = 0
    questions = {}
    for subtask in mme.SUBTASKS:
        file = shared / "mme" / "questions" / f"{subtask}.txt"
        lines = list(mme.read_columns(file, ("image", "question", "Yes|No")))
        mme.check_pairs([fields[0] for _, fields in lines], str(file))
        total += len(lines)
        questions[subtask] = [(image, text, truth.lower()) for _, (image, text, truth) in lines]
    assert total == mme.PUBLISHED["test"]
    assert mme.find_deviations(questions) == []


@pytest.mark.hub
def test_the_hub_has_the_published_questions(tmp_path: Path):
    assert mme.prepare("hub", tmp_path / "mme").counts == mme.PUBLISHED
