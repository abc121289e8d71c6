"""MME (Fu et al., 2023): 2 374 yes/no questions in 14 subtasks, two an image, for judging only.

Four sources give the same questions: the official folder tree, three-column files with the images beside them, the
hub's parquet files, and what `prepare` writes (three-column files).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data import hub, records
from blipfit.data.images import decode_image
from blipfit.data.prepared import PrepareReport, check_images, folder
from blipfit.data.question import Question
from blipfit.errors import UserError

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
SUBTASKS = PERCEPTION + COGNITION
TRUTHS = ("yes", "no")

HUB_NAME = "lmms-lab/MME"
HUB_REVISION = "d6c9023f017b564f7b3ccccf5348166bce8fdbcd"
PUBLISHED = {"test": 2374}

# The official archive, as unpacked or as passed on, wraps the subtasks' folders in these.
_WRAPPERS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark")
_SUFFIXES = (".jpg", ".jpeg", ".png")


def prepare(source: str | Path, to: Path) -> PrepareReport:
    """Write `SUBTASK.txt` (image, question, Yes|No; two consecutive lines an image) and the images `SUBTASK/NAME`.

    `source` is `hub`, a folder with the hub's parquet files, or anything that `read_questions` reads.
    """
    if str(source) == "hub":
        return _from_hub(hub.download(HUB_NAME, HUB_REVISION, ("test",)), to)
    if hub.is_download(Path(source)):
        return _from_hub(Path(source), to)
    questions = read_questions(Path(source))
    images = {question.image: f"{question.tags['subtask']}/{question.tags['file']}" for question in questions}
    check_images(images)
    with folder(to, ours=[f"{subtask}.txt" for subtask in SUBTASKS]) as out:
        for image, name in images.items():
            out.place(image, name)
        for subtask, lines in _lines(questions).items():
            out.write_text("".join(lines), f"{subtask}.txt")
    return PrepareReport("mme", to, {"test": len(questions)}, images=out.placed, published=PUBLISHED)


def load(folder: Path, split: str) -> list[Question]:
    """The questions of a folder; MME has only the split `test`."""
    if split != "test":
        raise UserError(f"MME is for judging: it has the split test, not {split}")
    return read_questions(folder)


def read_questions(folder: Path, images: Path | None = None) -> list[Question]:
    """Read all subtasks that a folder holds, in the official order of subtasks, two consecutive questions an image.

    Layouts: three-column files `SUBTASK.txt`, with the images at `SUBTASK/NAME` or `SUBTASK/images/NAME` in the
    folder or in `images`; or the official tree, where `SUBTASK/` holds `NAME.jpg` (or .png) and `NAME.txt` side by
    side, or in `images/` and `questions_answers_YN/`. Answers are `Yes` or `No`; tags: subtask, file (the image's
    name). A missing image, an odd line or a pair that names two images is a UserError.
    """
    if any((folder / f"{subtask}.txt").is_file() for subtask in SUBTASKS):
        found = {s: list(_from_file(folder / f"{s}.txt", s, images or folder)) for s in _with_file(folder)}
    else:
        found = {s: list(_from_tree(place, s)) for s, place in _with_folder(folder).items()}
    return [question for questions in found.values() for question in questions]


def check_pairs(images: Sequence[str], where: str) -> None:
    """Refuse a subtask whose consecutive lines do not name one image two by two: it would be scored as garbage."""
    if not images:
        raise UserError(f"{where}: there are no lines in it")
    if len(images) % 2:
        raise UserError(f"{where}: {len(images)} lines, but MME has two an image; a line is missing or too many")
    for at in range(0, len(images), 2):
        if images[at] != images[at + 1]:
            raise UserError(
                f"{where}:{at + 1}: this line names {images[at]} and the next {images[at + 1]}, but two consecutive "
                "lines must name one image; restore the official order"
            )


def columns(file: Path, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (`file:line`, columns) of a file whose every line has just these columns, with tabs between them."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        damaged = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{damaged}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    # Lines end at newlines only: a response may hold the other separators that str.splitlines knows.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise UserError(
                f"{file}:{number}: a line must have {len(names)} columns with tabs between them "
                f"({', '.join(names)}) but this one has {len(fields) if line else 'none'}"
            )
        yield f"{file}:{number}", fields


def truth(text: str, where: str) -> str:
    """`yes` or `no`; anything else in the column of the truth is a UserError."""
    if text.lower() not in TRUTHS:
        raise UserError(f"{where}: the truth must be Yes or No but is {text!r}")
    return text.lower()


def _with_file(folder: Path) -> list[str]:
    return [subtask for subtask in SUBTASKS if (folder / f"{subtask}.txt").is_file()]


def _with_folder(folder: Path) -> dict[str, Path]:
    for wrapper in _WRAPPERS:
        if found := {s: folder / wrapper / s for s in SUBTASKS if (folder / wrapper / s).is_dir()}:
            return found
    raise UserError(
        f"{folder} holds no MME: neither SUBTASK.txt nor folders SUBTASK/ ({', '.join(SUBTASKS[:3])}, …) are in it; "
        "give the unpacked MME_Benchmark_release_version, or --from hub"
    )


def _from_file(file: Path, subtask: str, images: Path) -> Iterator[Question]:
    lines = list(columns(file, ("image", "question", "Yes|No")))
    check_pairs([fields[0] for _, fields in lines], str(file))
    for number, (where, (name, question, right)) in enumerate(lines):
        tries = [images / subtask / name, images / subtask / "images" / name]
        image = records.find_image(tries, where, "put the images of the official archive there")
        yield _question(subtask, name, number % 2, image, question, truth(right.strip(), where))


def _from_tree(place: Path, subtask: str) -> Iterator[Question]:
    apart = (place / "images").is_dir()
    texts, pictures = (place / "questions_answers_YN", place / "images") if apart else (place, place)
    files = sorted(texts.glob("*.txt"))
    if not files:
        raise UserError(f"{texts} holds no questions (NAME.txt with two lines `question, tab, Yes|No`)")
    for file in files:
        lines = list(columns(file, ("question", "Yes|No")))
        if len(lines) != 2:
            raise UserError(f"{file}: {len(lines)} questions, but MME has two an image")
        tries = [pictures / f"{file.stem}{suffix}" for suffix in _SUFFIXES]
        image = records.find_image(tries, str(file), "put the images of the official archive there")
        for at, (where, (question, right)) in enumerate(lines):
            yield _question(subtask, image.name, at, image, question, truth(right.strip(), where))


def _question(subtask: str, name: str, at: int, image: Path, question: str, right: str) -> Question:
    tags = {"subtask": subtask, "file": name}
    return Question(f"{subtask}/{name}/{at + 1}", image, question, right.capitalize(), tags=tags)


def _lines(questions: Sequence[Question]) -> dict[str, list[str]]:
    lines: dict[str, list[str]] = {}
    for question in questions:
        line = f"{question.tags['file']}\t{question.question}\t{question.answer}\n"
        lines.setdefault(question.tags["subtask"], []).append(line)
    return lines


def _from_hub(source: Path, to: Path) -> PrepareReport:
    """Write the hub's rows: question_id `SUBTASK/NAME` (once a question, so twice), image, question, answer, category.

    The images come as they are, one by one: all of them together take most of a gigabyte.
    """
    found: dict[str, dict[str, list[tuple[str, str]]]] = {}
    with folder(to, ours=[f"{subtask}.txt" for subtask in SUBTASKS]) as out:
        for number, row in enumerate(hub.rows(source, "test")):
            where = f"{source}: row {number}"
            subtask, name = _place(row, where)
            asked = found.setdefault(subtask, {}).setdefault(name, [])
            if not asked:
                out.write_image(_image(row, where), f"{subtask}/{name}")
            asked.append((" ".join(records.text(row, "question", where).split("\t")), _right(row, where)))
        for subtask, images in found.items():
            lines = []
            for name, asked in images.items():
                if len(asked) != 2:
                    raise UserError(f"{source}: {subtask}/{name} has {len(asked)} questions, but MME has two an image")
                lines += [f"{name}\t{question}\t{right}\n" for question, right in asked]
            out.write_text("".join(lines), f"{subtask}.txt")
    count = sum(len(asked) for images in found.values() for asked in images.values())
    return PrepareReport("mme", to, {"test": count}, images=out.placed, published=PUBLISHED)


def _place(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    subtask = records.text(row, "category", where)
    if subtask not in SUBTASKS:
        raise UserError(f"{where}: 'category' is {subtask!r}, which is none of {', '.join(SUBTASKS)}")
    return subtask, records.text(row, "question_id", where).rpartition("/")[2]


def _image(row: Mapping[str, Any], where: str) -> bytes:
    image = row.get("image")
    if not image or not image.get("bytes"):
        raise UserError(f"{where}: its image is missing; download the data set again")
    decode_image(image["bytes"], where)
    return image["bytes"]


def _right(row: Mapping[str, Any], where: str) -> str:
    return truth(records.text(row, "answer", where).strip(), where).capitalize()
