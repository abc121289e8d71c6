"""Own data: one JSON object a line with `image, question, answer` and, if wanted, `choices, context, id`.

`answer` is the number of a choice, counted from 0, or its text; without `choices` it is free text. Images are
found from the folder of the file.
"""

import difflib
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit.data import records
from blipfit.data.prepared import PrepareReport, check_images, folder
from blipfit.data.question import SPLITS, Question
from blipfit.errors import UserError

KEYS = ("image", "question", "choices", "answer", "context", "id")
HELD_OUT = {"val": 0.1, "test": 0.1}


def prepare(source: str | Path, to: Path) -> PrepareReport:
    """Check every line and image, and write `{split}.jsonl` with the images beside them.

    `source` is a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, or one file, which is split
    80/10/10 by image: no image is in two splits, and the same file always gives the same splits.
    """
    source = Path(source)
    if source.is_file():
        splits = _split(read(source), source)
    elif (source / "train.jsonl").is_file():
        splits = {split: load(source, split) for split in SPLITS}
    else:
        raise UserError(
            f"{source} is no own data: give a .jsonl file, or a folder with "
            f"{', '.join(f'{split}.jsonl' for split in SPLITS)}"
        )
    base = source if source.is_dir() else source.parent
    names = {question.image: _name(question.image, base) for split in splits.values() for question in split}
    check_images(names)
    with folder(to, ours=[f"{split}.jsonl" for split in SPLITS]) as out:
        for image, name in names.items():
            out.place(image, name)
        for split, questions in splits.items():
            out.write_text("".join(_line(q, names[q.image]) for q in questions), f"{split}.jsonl")
    counts = {split: len(questions) for split, questions in splits.items()}
    return PrepareReport("own", to, counts, {}, out.placed)


def load(folder: Path, split: str) -> list[Question]:
    """Read `{split}.jsonl` of a folder."""
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(
            f"{file} is missing; own data is a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)} "
            f"(`blipfit prepare own --from data.jsonl --to DIR` splits one file)"
        )
    return read(file)


def read(file: Path) -> list[Question]:
    """Read one JSONL file; a question without an `id` gets the number of its line."""
    questions = []
    seen: dict[str, str] = {}
    for where, record in records.read_lines(file):
        question = _question(record, where, file.parent)
        if question.id in seen:
            raise UserError(f"{where}: 'id' {question.id} is already that of line {seen[question.id]}")
        seen[question.id] = where.rpartition(":")[2]
        questions.append(question)
    return questions


def _question(record: Mapping[str, Any], where: str, base: Path) -> Question:
    for key in record:
        if key not in KEYS:
            near = difflib.get_close_matches(key, KEYS, n=1)
            mend = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(KEYS)}"
            raise UserError(f"{where}: unknown key {key!r}; {mend}")
    image = base / records.text(record, "image", where)
    if not image.is_file():
        raise UserError(f"{where}: image {image} is missing; paths start at the folder of the .jsonl file")
    choices = records.choices(record, where) if "choices" in record else ()
    number = _number(record, choices, where) if choices else None
    answer = records.text(record, "answer", where) if number is None else choices[number]
    if not answer.strip():
        raise UserError(f"{where}: 'answer' is empty")
    return Question(
        id=_id(record, where),
        image=image,
        question=records.text(record, "question", where),
        answer=answer,
        choices=choices,
        answer_index=number,
        context=records.text(record, "context", where) if "context" in record else "",
    )


def _number(record: Mapping[str, Any], choices: tuple[str, ...], where: str) -> int:
    """The place of the answer among the choices; a text must be one of them, and only one."""
    answer = record.get("answer")
    if not isinstance(answer, str):
        return records.index(record, choices, where)
    if choices.count(answer) > 1:
        raise UserError(f"{where}: several choices read {answer!r}; give 'answer' as a number")
    if answer not in choices:
        raise UserError(f"{where}: 'answer' is {answer!r}, which is none of {list(choices)}")
    return choices.index(answer)


def _id(record: Mapping[str, Any], where: str) -> str:
    own = record.get("id", where.rpartition(":")[2])
    if not isinstance(own, str | int) or isinstance(own, bool) or own == "":
        raise UserError(f"{where}: 'id' must be a text or a whole number but is {own!r}")
    return str(own)


def _split(questions: list[Question], file: Path) -> dict[str, list[Question]]:
    unique = {question.image for question in questions}
    images = sorted(unique, key=lambda image: _hash(_name(image, file.parent)))
    if len(images) < len(SPLITS):
        raise UserError(f"{file} has {len(images)} images, too few for train, val and test; give at least 3")
    held = {split: max(1, round(len(images) * HELD_OUT[split])) for split in HELD_OUT}
    val, test = held["val"], held["val"] + held["test"]
    homes = {"train": set(images[test:]), "val": set(images[:val]), "test": set(images[val:test])}
    return {split: [q for q in questions if q.image in homes[split]] for split in SPLITS}


def _name(image: Path, base: Path) -> str:
    """The image's place in the prepared folder: as in the source, or under `images/` if it lay outside it."""
    if image.is_relative_to(base) and ".." not in image.relative_to(base).parts:
        return image.relative_to(base).as_posix()
    return f"images/{_hash(str(image))[:8]}-{image.name}"


def _line(question: Question, image: str) -> str:
    record: dict[str, Any] = {"id": question.id, "image": image, "question": question.question}
    if question.choices:
        record["choices"] = question.choices
    record["answer"] = question.answer if question.answer_index is None else question.answer_index
    if question.context:
        record["context"] = question.context
    return json.dumps(record, ensure_ascii=False) + "\n"


def _hash(name: str) -> str:
    return hashlib.blake2b(name.encode()).hexdigest()
