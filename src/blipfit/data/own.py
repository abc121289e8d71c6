"""The user's own data: one JSON object per line with `image, question, answer` and optionally `choices, context, id`.

`answer` is the index of a choice, counted from 0, or its text; without `choices` it is free text. Image paths are
relative to the folder of the file.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit.data import records
from blipfit.data.prepared import PrepareReport, check_images, output_folder
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

KEYS = ("image", "question", "choices", "answer", "context", "id")
HELD_OUT = {"val": 0.1, "test": 0.1}
"""Fraction of the images in val and test when one file is split."""


def prepare(source: str | Path, to: Path) -> PrepareReport:
    """Check every line and image, and write `{split}.jsonl` with the images beside them.

    `source` is a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, or one file, which is split 80/10/10 by
    image: no image is in two splits, and equal files give equal splits. Raises UserError if a line or an image is
    invalid or `to` cannot be written.
    """
    source = Path(source)
    if source.is_file():
        splits = _split(read_questions(source), source)
    elif (source / "train.jsonl").is_file():
        splits = {split: load(source, split) for split in SPLITS}
    else:
        raise UserError(
            f"{source} is not a data set: give a .jsonl file, or a folder with "
            f"{', '.join(f'{split}.jsonl' for split in SPLITS)}"
        )
    base = source if source.is_dir() else source.parent
    names = {question.image: _image_name(question.image, base) for split in splits.values() for question in split}
    check_images(names)
    with output_folder(to, known_names=[f"{split}.jsonl" for split in SPLITS]) as out:
        for image, name in names.items():
            out.add_image(image, name)
        for split, questions in splits.items():
            out.write_text("".join(_format_line(q, names[q.image]) for q in questions), f"{split}.jsonl")
    counts = {split: len(questions) for split, questions in splits.items()}
    return PrepareReport("own", to, counts, {}, out.image_counts)


def load(folder: Path, split: str) -> list[Question]:
    """Load `{split}.jsonl` of a folder; raises UserError if it is missing or a line or an image is invalid."""
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(
            f"{file} is missing; own data is a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)} "
            f"(`blipfit prepare own --from data.jsonl --to DIR` splits one file)"
        )
    return read_questions(file)


def read_questions(file: Path) -> list[Question]:
    """Read one JSONL file; a question without `id` gets its line number as id.

    Raises UserError if a line is invalid, an image is missing or an id occurs twice.
    """
    questions = []
    line_by_id: dict[str, str] = {}
    for location, record in records.read_lines(file):
        question = _question(record, location, file.parent)
        if question.id in line_by_id:
            raise UserError(f"{location}: 'id' {question.id} is already used in line {line_by_id[question.id]}")
        line_by_id[question.id] = location.rpartition(":")[2]
        questions.append(question)
    return questions


def _question(record: Mapping[str, Any], location: str, base: Path) -> Question:
    for key in record:
        if key not in KEYS:
            similar = difflib.get_close_matches(key, KEYS, n=1)
            fix = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(KEYS)}"
            raise UserError(f"{location}: unknown key {key!r}; {fix}")
    image = base / records.require_text(record, "image", location)
    if not image.is_file():
        raise UserError(f"{location}: image {image} is missing; paths are relative to the folder of the .jsonl file")
    choices = records.require_choices(record, location) if "choices" in record else ()
    answer_index = _answer_index(record, choices, location) if choices else None
    answer = records.require_text(record, "answer", location) if answer_index is None else choices[answer_index]
    if not answer.strip():
        raise UserError(f"{location}: 'answer' is empty")
    return Question(
        id=_id(record, location),
        image=image,
        question=records.require_text(record, "question", location),
        answer=answer,
        choices=choices,
        answer_index=answer_index,
        context=records.require_text(record, "context", location) if "context" in record else "",
    )


def _answer_index(record: Mapping[str, Any], choices: tuple[str, ...], location: str) -> int:
    """Return the index of the correct choice, given as an index or as the text of exactly one choice."""
    answer = record.get("answer")
    if not isinstance(answer, str):
        return records.require_answer_index(record, choices, location)
    if choices.count(answer) > 1:
        raise UserError(f"{location}: several choices read {answer!r}; give 'answer' as a number")
    if answer not in choices:
        raise UserError(f"{location}: 'answer' is {answer!r}, which is none of {list(choices)}")
    return choices.index(answer)


def _id(record: Mapping[str, Any], location: str) -> str:
    value = record.get("id", location.rpartition(":")[2])
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise UserError(f"{location}: 'id' must be a text or a whole number but is {value!r}")
    return str(value)


def _split(questions: list[Question], file: Path) -> dict[str, list[Question]]:
    """Divide the questions into train, val and test by the hash of their image's name."""
    unique = {question.image for question in questions}
    images = sorted(unique, key=lambda image: _hash(_image_name(image, file.parent)))
    if len(images) < len(SPLITS):
        raise UserError(f"{file} has {len(images)} images, too few for train, val and test; give at least 3")
    counts = {split: max(1, round(len(images) * HELD_OUT[split])) for split in HELD_OUT}
    val_end, test_end = counts["val"], counts["val"] + counts["test"]
    split_images = {
        "train": set(images[test_end:]),
        "val": set(images[:val_end]),
        "test": set(images[val_end:test_end]),
    }
    return {split: [q for q in questions if q.image in split_images[split]] for split in SPLITS}


def _image_name(image: Path, base: Path) -> str:
    """Return the image's path in the prepared folder: as in the source, or in `images/` if it is outside the source."""
    if image.is_relative_to(base) and ".." not in image.relative_to(base).parts:
        return image.relative_to(base).as_posix()
    return f"images/{_hash(str(image))[:8]}-{image.name}"


def _format_line(question: Question, image: str) -> str:
    record: dict[str, Any] = {"id": question.id, "image": image, "question": question.question}
    if question.choices:
        record["choices"] = question.choices
    record["answer"] = question.answer if question.answer_index is None else question.answer_index
    if question.context:
        record["context"] = question.context
    return json.dumps(record, ensure_ascii=False) + "\n"


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode()).hexdigest()
