"""ScienceQA (Lu et al., 2022; CC BY-NC-SA 4.0): the problems that have an image.

The annotation files are equal, byte by byte, to those of the published experiments
(github.com/AttentionX/InstructBLIP_PEFT), so a folder prepared for one can be loaded by the other.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipfit.data import annotations, hub
from blipfit.data.images import decode_image
from blipfit.data.prompts import format_choices
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import OutputFolder, PrepareReport, Source, check_images, output_folder
from blipfit.errors import UserError

HUB_NAME = "derek-thomas/ScienceQA"
HUB_REVISION = "f18b0a70359ebfb41f658fd564208d0355b013f4"
PUBLISHED = {"train": 6218, "val": 2097, "test": 2017}
ANNOTATIONS = {split: f"scienceqa_{split}.json" for split in SPLITS}
TAGS_FILE = "scienceqa_facts.json"
TAG_NAMES = ("subject", "grade", "topic", "category", "skill")
_GRADE = re.compile(r"(?:grade)?(?:[1-9]|1[0-2])", re.ASCII)
IMAGE_ZIPS = "https://scienceqa.s3.us-west-1.amazonaws.com/images"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of the data set."""

    id: str
    split: str
    record: Mapping[str, Any]
    """The fields of the official files."""
    image: Path | bytes | None
    """The image's file, its content, or None if the problem has no image."""
    location: str
    """File and entry, for error messages."""


def prepare(source: str | Path, to: Path, *, allow_outside: bool = False) -> PrepareReport:
    """Write `scienceqa_{split}.json`, the images, and the tags by which results are grouped.

    `source` is `hub`, a folder in the official layout (`problems.json`, `pid_splits.json`,
    `images/SPLIT/PID/image.png`), or a folder with the hub's parquet files. Images outside of it need `allow_outside`
    and are copied. Raises UserError if the source is incomplete or damaged, or `to` cannot be written.
    """
    if str(source) == "hub":
        source = hub.download(HUB_NAME, HUB_REVISION)
        return _write(_read_parquet(source), to, file_sizes=hub.file_sizes(source, SPLITS))
    source = Path(source)
    root = _official_root(source)
    if root is None and hub.is_download(source):
        return _write(_read_parquet(source), to, file_sizes=hub.file_sizes(source, SPLITS))
    if root is None:
        raise UserError(
            f"{source} is not a ScienceQA folder: it has neither problems.json with pid_splits.json nor "
            f"data/train-*.parquet; give the folder that holds them, or --from hub"
        )
    problems = list(_read_official(root))
    allowed = Source(source, allow_outside)
    images = [problem.image for problem in problems if isinstance(problem.image, Path)]
    check_images(images, allowed)
    return _write(problems, to, allowed, images)


def load(folder: Path, split: str) -> list[Question]:
    """Load one split of a prepared folder, or of a folder prepared for the published experiments.

    Raises UserError if the folder is not prepared, an entry or its image is missing or invalid, or a `question_id`
    occurs twice in the folder's annotation files.
    """
    file = folder / ANNOTATIONS[split]
    if not file.is_file():
        raise UserError(
            f"{folder} is not a prepared ScienceQA folder ({file.name} is missing); "
            f"run `blipfit prepare scienceqa --from DIR --to {folder}`"
        )
    tags = _load_tags(folder)
    entries = annotations.require_list(annotations.read_json(file), str(file))
    questions = [_question(entry, f"{file}: entry {n}", folder, tags) for n, entry in enumerate(entries, start=1)]
    _refuse_repeated_ids(folder, split, questions)
    return questions


def _refuse_repeated_ids(folder: Path, split: str, questions: Iterable[Question]) -> None:
    """Raise UserError if an id occurs twice in the split, or in another split of the folder too."""
    entry_by_id: dict[str, int] = {}
    for number, question in enumerate(questions, start=1):
        if (first := entry_by_id.setdefault(question.id, number)) != number:
            raise UserError(
                f"{folder / ANNOTATIONS[split]}: entries {first} and {number} both have question_id {question.id}; "
                "remove one of them"
            )
    for other in SPLITS:
        file = folder / ANNOTATIONS[other]
        if other == split or not file.is_file():
            continue
        for entry in annotations.require_list(annotations.read_json(file), str(file)):
            if isinstance(entry, dict) and (pid := str(entry.get("question_id"))) in entry_by_id:
                raise UserError(
                    f"{folder}: question_id {pid} is in {ANNOTATIONS[split]} and in {file.name}, so a question would "
                    "be in two splits; remove it from one of them"
                )


def _official_root(source: Path) -> Path | None:
    for root in (source, source / "scienceqa", source / "data" / "scienceqa"):
        if (root / "problems.json").is_file() and (root / "pid_splits.json").is_file():
            return root
    return None


def _read_official(root: Path) -> Iterator[Problem]:
    file = root / "problems.json"
    problems = annotations.require_object(annotations.read_json(file), str(file))
    splits_file = root / "pid_splits.json"
    splits = annotations.require_object(annotations.read_json(splits_file), str(splits_file))
    split_of: dict[str, str] = {}
    for split in SPLITS:
        for pid in map(str, annotations.require_list(splits.get(split), f"{splits_file}: {split}")):
            if (first := split_of.get(pid)) is not None:
                twice, both = f"{split} names problem {pid} twice", f"{first} and {split} both name problem {pid}"
                raise UserError(f"{splits_file}: {twice if first == split else both}; name every problem only once")
            split_of[pid] = split
            if pid not in problems:
                raise UserError(f"{splits_file}: {split} names problem {pid}, which is not in {file}")
            location = f"{file}: problem {pid}"
            record = annotations.require_object(problems[pid], location)
            image = None
            if record.get("image"):
                image = annotations.find_image(
                    [root / "images" / split / pid / "image.png", root / split / pid / "image.png"],
                    location,
                    f"unpack {IMAGE_ZIPS}/{split}.zip there",
                )
            yield Problem(pid, split, record, image, location)


def _read_parquet(download: Path) -> Iterator[Problem]:
    """Yield the hub's problems; they have no numbers there, so the id is the split with the row, from 0."""
    for split in SPLITS:
        for row, record in enumerate(hub.read_rows(download, split)):
            location = f"{download}: {split} row {row}"
            image = (annotations.require_object(record, location).get("image") or {}).get("bytes")
            if image is not None:
                decode_image(image, location)
            yield Problem(f"{split}-{row}", split, record, image, location)


def _write(
    problems: Iterable[Problem],
    to: Path,
    source: Source | None = None,
    images: Iterable[Path] = (),
    file_sizes: Iterable[int] = (),
) -> PrepareReport:
    """Write the problems; the disk must have room for image files, and for images in files of these bytes."""
    annotations: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    tags: dict[str, dict[str, str]] = {}
    left_out: Counter[str] = Counter()
    with output_folder(to, (*ANNOTATIONS.values(), "images"), source) as out:
        out.require_space(images, file_sizes)
        for problem in problems:
            if problem.image is None:
                left_out["without an image"] += 1
                continue
            annotations[problem.split].append(_annotation(problem))
            tags[problem.id] = _tags(problem.record, problem.location)
            _add_image(out, problem.image, f"images/{problem.split}/{problem.id}/image.png")
        if not tags:
            raise UserError(f"nothing to prepare: none of {sum(left_out.values())} problems has an image")
        out.write_json(tags, TAGS_FILE)
        for split, entries in annotations.items():
            out.write_json(entries, ANNOTATIONS[split])
    counts = {split: len(entries) for split, entries in annotations.items()}
    written = [entry for entries in annotations.values() for entry in entries]
    return PrepareReport("scienceqa", to, counts, left_out, out.image_counts, PUBLISHED, notes=_notes(written))


def _notes(entries: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return sentences on the annotations without a clear answer: their number and the first one's id."""
    empty, equal = [], []
    for entry in entries:
        if not entry["question"].strip():
            empty.append(entry["question_id"])
        if len(set(entry["choices"])) < len(entry["choices"]):
            equal.append(entry["question_id"])
    kinds = (("with an empty question", empty), ("with two equal choices", equal))
    return [f"{len(ids)} problems {kind}, first {ids[0]}" for kind, ids in kinds if ids]


def _add_image(out: OutputFolder, image: Path | bytes, name: str) -> None:
    if isinstance(image, Path):
        out.add_image(image, name)
    else:
        out.write_image(image, name)


def _annotation(problem: Problem) -> dict[str, Any]:
    """Return the published annotation; its image path is relative to the folder ABOVE `scienceqa`."""
    record, location = problem.record, problem.location
    choices = annotations.require_choices(record, location)
    return {
        "image": f"scienceqa/images/{problem.split}/{problem.id}/image.png",
        "question": annotations.require_text(record, "question", location),
        "answer": format_choices(choices)[annotations.require_answer_index(record, choices, location)],
        "choices": choices,
        "context": annotations.require_text(record, "hint", location)
        + " "
        + annotations.require_text(record, "lecture", location),
        "question_id": problem.id,
    }


def _tags(record: Mapping[str, Any], location: str) -> dict[str, str]:
    """Return the tags of the official leaderboard's columns; its column TXT counts the problems with a hint.

    Raises UserError if the grade is not one of 1 to 12.
    """
    _check_grade(record, location)
    context = "text+image" if record.get("hint") else "image"
    return {name: str(record[name]) for name in TAG_NAMES if record.get(name)} | {"context": context}


def _check_grade(tags: Mapping[str, Any], location: str) -> None:
    grade = tags.get("grade")
    if grade and not _GRADE.fullmatch(str(grade)):
        raise UserError(f"{location}: 'grade' must be grade1 to grade12 but is {str(grade)[:40]!r}")


def _load_tags(folder: Path) -> Mapping[str, Mapping[str, str]]:
    """Return the tags by problem id: from `prepare`'s file, else from the official file, else none."""
    if (file := folder / TAGS_FILE).is_file():
        tags = annotations.require_object(annotations.read_json(file), str(file))
        for pid, values in tags.items():
            location = f"{file}: problem {pid}"
            if not all(isinstance(value, str) for value in annotations.require_object(values, location).values()):
                raise UserError(f"{location}: every tag must be text; prepare the folder again")
            _check_grade(values, location)
        return tags
    if (file := folder / "problems.json").is_file():
        problems = annotations.require_object(annotations.read_json(file), str(file))
        locations = {pid: f"{file}: problem {pid}" for pid in problems}
        return {pid: _tags(annotations.require_object(problems[pid], where), where) for pid, where in locations.items()}
    return {}


def _question(entry: Any, location: str, folder: Path, tags: Mapping[str, Mapping[str, str]]) -> Question:
    record = annotations.require_object(entry, location)
    choices = annotations.require_choices(record, location)
    answer = annotations.require_text(record, "answer", location)
    if answer not in format_choices(choices):
        raise UserError(f"{location}: 'answer' is {answer!r}, which is none of {', '.join(format_choices(choices))}")
    answer_index = format_choices(choices).index(answer)
    context = annotations.require_text(record, "context", location)
    if "question_id" not in record:
        raise UserError(f"{location}: 'question_id' is missing")
    pid = str(record["question_id"])
    return Question(
        id=pid,
        image=_find_image(annotations.require_text(record, "image", location), folder, location),
        question=annotations.require_text(record, "question", location),
        answer=choices[answer_index],
        choices=choices,
        answer_index=answer_index,
        context=context,
        # The context is hint + space + lecture, so without a hint it starts with the space.
        tags=tags.get(pid) or {"context": "image" if context.startswith(" ") else "text+image"},
        transparency="dropped",
    )


def _find_image(image: str, folder: Path, location: str) -> Path:
    """Find an image by its annotated path, whatever folder that path is relative to.

    Published files have paths `scienceqa/images/…`, relative to the parent of their folder; others have absolute paths
    of another machine. The part after `images/` is always the same.
    """
    start = image.rfind("images/")
    in_folder = [folder / image[start:]] if start >= 0 else []
    paths = [*in_folder, folder / image, folder.parent / image]
    return annotations.find_image(paths, location, "put the images into the folder, or prepare it again")
