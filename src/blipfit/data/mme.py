"""MME (Fu et al., 2023): 2 374 yes/no questions in 14 subtasks, two per image, for evaluation only.

Four layouts contain the same questions: the official folder tree, three-column files with the images beside them, the
hub's parquet files, and the folder that `prepare` writes (three-column files).
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data import annotations, hub
from blipfit.data.images import decode_image
from blipfit.data.question import Question
from blipfit.data.write_prepared import PrepareReport, Source, check_images, output_folder
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
MAX_SCORE = 200
"""Highest score of a subtask; a total is the sum of its subtasks' scores."""

HUB_NAME = "lmms-lab/MME"
HUB_REVISION = "d6c9023f017b564f7b3ccccf5348166bce8fdbcd"
PUBLISHED = {"test": 2374}
PUBLISHED_COUNTS = {
    "existence": 60,
    "count": 60,
    "position": 60,
    "color": 60,
    "posters": 294,
    "celebrity": 340,
    "scene": 400,
    "landmark": 400,
    "artwork": 400,
    "OCR": 40,
    "commonsense_reasoning": 140,
    "numerical_calculation": 40,
    "text_translation": 40,
    "code_reasoning": 40,
}
"""Number of questions of every subtask."""

# Folders that contain the subtasks' folders in the official archive and in copies of it.
_WRAPPERS = ("", "MME_Benchmark_release_version", "MME_Benchmark_release_version/MME_Benchmark", "MME_Benchmark")
_SUFFIXES = (".jpg", ".jpeg", ".png")


def prepare(source: str | Path, to: Path, *, allow_outside: bool = False) -> PrepareReport:
    """Write `SUBTASK.txt` (image, question, Yes|No; two consecutive lines per image) and the images `SUBTASK/NAME`.

    `source` is `hub`, a folder with the hub's parquet files, or anything that `read_questions` reads. Images outside of
    it need `allow_outside` and are copied. Raises UserError if the source is incomplete or damaged, or `to` cannot be
    written.
    """
    if str(source) == "hub":
        return _prepare_from_hub(hub.download(HUB_NAME, HUB_REVISION, ("test",)), to)
    if hub.is_download(Path(source)):
        return _prepare_from_hub(Path(source), to)
    questions = read_questions(Path(source))
    images = {question.image: f"{question.tags['subtask']}/{question.tags['file']}" for question in questions}
    allowed = Source(Path(source), allow_outside)
    check_images(images, allowed)
    with output_folder(to, [f"{subtask}.txt" for subtask in SUBTASKS], allowed) as out:
        out.require_space(images)
        for image, name in images.items():
            out.add_image(image, name)
        for subtask, lines in _format_lines(questions).items():
            out.write_text("".join(lines), f"{subtask}.txt")
    return _report(to, group_by_subtask(questions), out.image_counts)


def _report(
    to: Path, questions: Mapping[str, Sequence[tuple[str, str, str]]], images: Mapping[str, int]
) -> PrepareReport:
    notes = [f"not the MME benchmark: {difference}" for difference in find_deviations(questions)]
    count = sum(map(len, questions.values()))
    return PrepareReport("mme", to, {"test": count}, images=images, published=PUBLISHED, notes=notes)


def load(folder: Path, split: str) -> list[Question]:
    """Load the questions of a folder; raises UserError if they are invalid or `split` is not `test`."""
    if split != "test":
        raise UserError(f"MME is for evaluation only: it has the split test, not {split}")
    return read_questions(folder)


def read_questions(folder: Path, images: Path | None = None) -> list[Question]:
    """Read all subtasks in a folder, in the official order of subtasks; two consecutive questions share an image.

    Layouts: three-column files `SUBTASK.txt`, with the images at `SUBTASK/NAME` or `SUBTASK/images/NAME` in the folder
    or in `images`; or the official tree, where `SUBTASK/` has `NAME.jpg` (or .png) and `NAME.txt` side by side, or in
    `images/` and `questions_answers_YN/`. Answers are `Yes` or `No`; tags: subtask, file (the image's name).
    Raises UserError for a missing image, an invalid line, or a pair of lines that names two images.
    """
    if any((folder / f"{subtask}.txt").is_file() for subtask in SUBTASKS):
        subtasks = [subtask for subtask in SUBTASKS if (folder / f"{subtask}.txt").is_file()]
        parts = [list(_read_file(folder / f"{subtask}.txt", subtask, images or folder)) for subtask in subtasks]
    else:
        parts = [list(_read_tree(tree, subtask)) for subtask, tree in _subtask_folders(folder).items()]
    return [question for questions in parts for question in questions]


def check_pairs(images: Sequence[str], location: str) -> None:
    """Raise UserError unless the lines of a subtask are pairs that name one image, as the MME score requires.

    `images` are the image names of consecutive lines; `location` is the file.
    """
    if not images:
        raise UserError(f"{location}: the file is empty; expected two lines per image")
    if len(images) % 2:
        raise UserError(
            f"{location}: {len(images)} lines, but MME has two per image; add the missing line or remove the extra one"
        )
    for index in range(0, len(images), 2):
        first, second = images[index : index + 2]
        if first != second:
            raise UserError(
                f"{location}:{index + 1}: this line names {first} and the next {second}, but two consecutive lines "
                "must name one image; restore the official order"
            )


def find_deviations(questions_by_subtask: Mapping[str, Sequence[tuple[str, str, str]]]) -> list[str]:
    """Return how questions differ from the MME benchmark, one sentence each; empty if they can be the benchmark.

    `questions_by_subtask` has (image name, question, `yes` or `no`) of consecutive lines. The benchmark has a fixed
    number of questions in each of the 14 subtasks, no question of an image twice, no empty question, and one Yes and
    one No for every image.
    """
    wrong_counts, deviations = [], []
    if missing := [subtask for subtask in SUBTASKS if not questions_by_subtask.get(subtask)]:
        deviations.append(f"{len(missing)} of {len(SUBTASKS)} subtasks have no questions")
    for subtask in SUBTASKS:
        questions, count = questions_by_subtask.get(subtask, ()), PUBLISHED_COUNTS[subtask]
        if questions and len(questions) != count:
            wrong_counts.append(f"{subtask} {len(questions)} of {count}")
    if wrong_counts:
        deviations.append(f"number of questions: {', '.join(wrong_counts)}")
    for subtask, questions in questions_by_subtask.items():
        repeated = [text for text, count in Counter((image, text) for image, text, _ in questions).items() if count > 1]
        if repeated:
            image, text = repeated[0]
            deviations.append(
                f"{subtask}: questions that occur more than once: {len(repeated)}, first {text[:60]!r} of {image}"
            )
        images = Counter(image for image, _, _ in questions)
        if crowded := [image for image, count in images.items() if count > 2]:
            deviations.append(f"{subtask}: images with more than two questions: {len(crowded)}, first {crowded[0]}")
        if empty := sum(not text.strip() for _, text, _ in questions):
            deviations.append(f"{subtask}: empty questions: {empty}")
        pairs = zip(questions[::2], questions[1::2], strict=False)
        if equal := [first[0] for first, second in pairs if first[2] == second[2]]:
            deviations.append(f"{subtask}: images with two equal truths: {len(equal)}, first {equal[0]}")
    return deviations


def group_by_subtask(questions: Sequence[Question]) -> dict[str, list[tuple[str, str, str]]]:
    """Return (image name, question, `yes` or `no`) of MME's questions by subtask, for `find_deviations`."""
    groups: dict[str, list[tuple[str, str, str]]] = {}
    for q in questions:
        groups.setdefault(q.tags["subtask"], []).append((q.tags["file"], q.question, q.answer.lower()))
    return groups


def read_columns(file: Path, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (`file:line`, columns) for every line of a tab-separated file without a header.

    `names` are the expected columns. Raises UserError if a line has another number of columns or the file cannot be
    read.
    """
    return parse_columns(_read_text(file), str(file), names)


def parse_columns(text: str, source: str, names: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield (`source:line`, columns) for every line of a file's text, as `read_columns` does."""
    # Split at newlines only: a response may contain the other separators that str.splitlines splits at.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        fields = line.split("\t")
        if len(fields) != len(names):
            raise UserError(
                f"{source}:{number}: a line must have {len(names)} columns with tabs between them "
                f"({', '.join(names)}) but this one has {len(fields) if line else 'none'}"
            )
        yield f"{source}:{number}", fields


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line_number = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line_number}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def parse_truth(text: str, location: str) -> str:
    """Return the ground truth as `yes` or `no`; raises UserError if it is anything else."""
    if text.lower() not in TRUTHS:
        raise UserError(f"{location}: the ground truth must be Yes or No but is {text!r}")
    return text.lower()


def _subtask_folders(folder: Path) -> dict[str, Path]:
    """Return the folder of every subtask in the official tree."""
    for wrapper in _WRAPPERS:
        folders = {subtask: folder / wrapper / subtask for subtask in SUBTASKS}
        existing = {subtask: path for subtask, path in folders.items() if path.is_dir()}
        if existing:
            return existing
    raise UserError(
        f"{folder} does not contain MME: it has neither SUBTASK.txt nor folders SUBTASK/ ({', '.join(SUBTASKS[:3])}, "
        "…); give the unpacked MME_Benchmark_release_version, or --from hub"
    )


def _read_file(file: Path, subtask: str, images: Path) -> Iterator[Question]:
    lines = list(read_columns(file, ("image", "question", "Yes|No")))
    check_pairs([columns[0] for _, columns in lines], str(file))
    for index, (location, (name, question, answer)) in enumerate(lines):
        paths = [images / subtask / name, images / subtask / "images" / name]
        image = annotations.find_image(paths, location, "put the images of the official archive there")
        yield _question(subtask, name, index % 2, image, question, parse_truth(answer.strip(), location))


def _read_tree(folder: Path, subtask: str) -> Iterator[Question]:
    has_subfolders = (folder / "images").is_dir()
    texts, images = (folder / "questions_answers_YN", folder / "images") if has_subfolders else (folder, folder)
    files = sorted(texts.glob("*.txt"))
    if not files:
        raise UserError(
            f"{texts} contains no questions; expected files NAME.txt with two lines `question, tab, Yes|No`"
        )
    for file in files:
        lines = list(read_columns(file, ("question", "Yes|No")))
        if len(lines) != 2:
            raise UserError(f"{file}: {len(lines)} questions, but MME has two per image")
        paths = [images / f"{file.stem}{suffix}" for suffix in _SUFFIXES]
        image = annotations.find_image(paths, str(file), "put the images of the official archive there")
        for index, (location, (question, answer)) in enumerate(lines):
            yield _question(subtask, image.name, index, image, question, parse_truth(answer.strip(), location))


def _question(subtask: str, name: str, index: int, image: Path, question: str, answer: str) -> Question:
    tags = {"subtask": subtask, "file": name}
    question_id = f"{subtask}/{name}/{index + 1}"
    return Question(question_id, image, question, answer.capitalize(), tags=tags, transparency="dropped")


def _format_lines(questions: Sequence[Question]) -> dict[str, list[str]]:
    """Return the lines of the file of every subtask."""
    lines: dict[str, list[str]] = {}
    for question in questions:
        line = f"{question.tags['file']}\t{question.question}\t{question.answer}\n"
        lines.setdefault(question.tags["subtask"], []).append(line)
    return lines


def _prepare_from_hub(source: Path, to: Path) -> PrepareReport:
    """Write the hub's rows; their columns are question_id (`SUBTASK/NAME`), image, question, answer, category.

    Every image is in two rows, not always consecutive ones. Images are written row by row, because all of them
    together take almost 1 GB.
    """
    questions: dict[str, dict[str, list[tuple[str, str]]]] = {}  # subtask → image name → questions and answers
    with output_folder(to, known_names=[f"{subtask}.txt" for subtask in SUBTASKS]) as out:
        out.require_space(file_sizes=hub.file_sizes(source, ("test",)))
        for number, row in enumerate(hub.read_rows(source, "test")):
            location = f"{source}: row {number}"
            subtask, name = _subtask_and_name(row, location)
            image_questions = questions.setdefault(subtask, {}).setdefault(name, [])
            if not image_questions:
                out.write_image(_image_bytes(row, location), f"{subtask}/{name}")
            text = " ".join(annotations.require_text(row, "question", location).split("\t"))
            image_questions.append((text, _answer(row, location)))
        for subtask, images in questions.items():
            out.write_text("".join(_format_pairs(images, f"{source}: {subtask}")), f"{subtask}.txt")
    lines = {
        subtask: [(name, text, answer.lower()) for name, pair in images.items() for text, answer in pair]
        for subtask, images in questions.items()
    }
    return _report(to, lines, out.image_counts)


def _format_pairs(images: Mapping[str, Sequence[tuple[str, str]]], location: str) -> list[str]:
    """Return the lines of one subtask; raise UserError if an image does not have two questions."""
    lines = []
    for name, pair in images.items():
        if len(pair) != 2:
            raise UserError(f"{location}/{name} has {len(pair)} questions, but MME has two per image")
        lines += [f"{name}\t{question}\t{answer}\n" for question, answer in pair]
    return lines


def _subtask_and_name(row: Mapping[str, Any], location: str) -> tuple[str, str]:
    """Return the subtask of a row and the file name of its image."""
    subtask = annotations.require_text(row, "category", location)
    if subtask not in SUBTASKS:
        raise UserError(f"{location}: 'category' is {subtask!r}, which is none of {', '.join(SUBTASKS)}")
    return subtask, annotations.require_text(row, "question_id", location).rpartition("/")[2]


def _image_bytes(row: Mapping[str, Any], location: str) -> bytes:
    image = row.get("image")
    if not image or not image.get("bytes"):
        raise UserError(f"{location}: its image is missing; download the data set again")
    decode_image(image["bytes"], location)
    return image["bytes"]


def _answer(row: Mapping[str, Any], location: str) -> str:
    return parse_truth(annotations.require_text(row, "answer", location).strip(), location).capitalize()
