"""The user's own data: one JSON object per line with `image, question, answer` and optionally `choices, context, id`.

`answer` is the index of a choice, counted from 0, or its text; without `choices` it is free text. Image paths are
relative to the folder of the file. Transparency is shown on white.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data import annotations, file_kinds
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import BAD_ENTRIES, ImageHashes, PrepareReport, Source, hash_images, output_folder
from blipfit.errors import UserError

KEYS = ("image", "question", "choices", "answer", "context", "id")
HELD_OUT = {"val": 0.1, "test": 0.1}
"""Fraction of the images in val and test when one file is split."""


Skip = Callable[[UserError], None]
"""Receives the error of an entry that is left out."""
Entry = tuple[str, Question]
"""Where a question is (`file:line`), and the question."""


def prepare(source: str | Path, to: Path, *, allow_outside: bool = False, skip_bad: bool = False) -> PrepareReport:
    """Check every line and image, and write `{split}.jsonl` with the images beside them.

    `source` is a folder with `train.jsonl`, `val.jsonl` and `test.jsonl`, or one file, which is split 80/10/10 by the
    images' content: no image is in two splits, also not as a copy or under another path, and equal images give equal
    splits. Images outside the source need `allow_outside` and are copied. With `skip_bad`, bad lines and lines with bad
    images are left out and listed in the report and in BAD_ENTRIES. Raises UserError if a line or an image is invalid,
    or `to` cannot be written.
    """
    source = Path(source)
    allowed = Source(source if source.is_dir() else source.parent, allow_outside)
    bad: list[str] = []

    def skip(error: UserError) -> None:
        if not skip_bad:
            raise error
        bad.append(str(error))

    entries = {split: _read_entries(file, skip) for split, file in _files(source).items()}
    hashes = _hash_images(entries, allowed, skip)
    splits = {name: [q for _, q in part if q.image in hashes] for name, part in entries.items()}
    if bad and not any(splits.values()):
        raise UserError(f"{source} has no entry that can be used; the first error: {bad[0]}")
    notes = []
    if source.is_file():
        splits = _split(splits["all"], hashes, source)
    elif leaks := _count_shared(splits, hashes):
        notes.append(f"{leaks} images are in more than one split")
    names = {q.image: _image_name(q.image, allowed) for split in splits.values() for q in split}
    with output_folder(to, [f"{split}.jsonl" for split in SPLITS], allowed) as out:
        out.require_space(names)
        for name, image in {name: image for image, name in names.items()}.items():  # two paths can have one name
            out.add_image(image, name)
        for split, questions in splits.items():
            out.write_text("".join(_format_line(q, names[q.image]) for q in questions), f"{split}.jsonl")
        if skip_bad:
            out.write_text("".join(f"{line}\n" for line in bad), BAD_ENTRIES)
    counts = {split: len(questions) for split, questions in splits.items()}
    return PrepareReport("own", to, counts, {}, out.image_counts, bad=bad, notes=notes)


def _files(source: Path) -> dict[str, Path]:
    """Return the files to read by split; a single file has the name `all`."""
    if source.is_file():
        return {"all": source}
    if not (source / "train.jsonl").is_file():
        raise UserError(
            f"{source} is not a data set: give a .jsonl file, or a folder with "
            f"{', '.join(f'{split}.jsonl' for split in SPLITS)}"
        )
    return {split: _split_file(source, split) for split in SPLITS}


def load(folder: Path, split: str) -> list[Question]:
    """Load `{split}.jsonl` of a folder; raises UserError if it is missing or a line or an image is invalid."""
    return read_questions(_split_file(folder, split))


def read_questions(file: Path) -> list[Question]:
    """Read one JSONL file; a question without `id` gets its line number as id.

    Raises UserError if a line is invalid, an image is missing or an id occurs twice.
    """
    return [question for _, question in _read_entries(file, _raise)]


def _split_file(folder: Path, split: str) -> Path:
    file = folder / f"{split}.jsonl"
    if not file.is_file():
        raise UserError(
            f"{file} is missing; own data is a folder with {', '.join(f'{s}.jsonl' for s in SPLITS)} "
            f"(`blipfit prepare own --from data.jsonl --to DIR` splits one file)"
        )
    return file


def _raise(error: UserError) -> None:
    raise error


def _read_entries(file: Path, skip: Skip) -> list[Entry]:
    """Read one JSONL file; `skip` receives the error of every invalid line."""
    entries = []
    line_by_id: dict[str, str] = {}
    for location, line in annotations.split_lines(file):
        try:
            question = _question(annotations.parse_line(line, location), location, file.parent)
            if question.id in line_by_id:
                raise UserError(f"{location}: 'id' {question.id} is already used in line {line_by_id[question.id]}")
        except UserError as error:
            skip(error)
            continue
        line_by_id[question.id] = location.rpartition(":")[2]
        entries.append((location, question))
    return entries


def _hash_images(entries: Mapping[str, Sequence[Entry]], source: Source, skip: Skip) -> dict[Path, ImageHashes]:
    """Return the hashes of all images; `skip` receives the error of every entry whose image cannot be used."""
    locations: dict[Path, list[str]] = {}
    for location, question in (entry for part in entries.values() for entry in part):
        locations.setdefault(question.image, []).append(location)
    hashes = {}
    for image, result in hash_images(locations, source):
        if isinstance(result, ImageHashes):
            hashes[image] = result
        else:
            for location in locations[image]:
                skip(UserError(f"{location}: {result}"))
    return hashes


def _count_shared(splits: Mapping[str, Sequence[Question]], hashes: Mapping[Path, ImageHashes]) -> int:
    """Return the number of images, by content, that are in more than one split."""
    contents = [{hashes[question.image].pixels for question in questions} for questions in splits.values()]
    return sum(sum(content in part for part in contents) > 1 for content in set().union(*contents))


def _question(record: Mapping[str, Any], location: str, base: Path) -> Question:
    for key in record:
        if key not in KEYS:
            similar = difflib.get_close_matches(key, KEYS, n=1)
            fix = f"did you mean {similar[0]!r}?" if similar else f"known: {', '.join(KEYS)}"
            raise UserError(f"{location}: unknown key {annotations.quote(key)}; {fix}")
    image = _image_path(annotations.require_text(record, "image", location), location, base)
    choices = annotations.require_choices(record, location) if "choices" in record else ()
    answer_index = _answer_index(record, choices, location) if choices else None
    answer = annotations.require_text(record, "answer", location) if answer_index is None else choices[answer_index]
    if not answer.strip():
        raise UserError(f"{location}: 'answer' is empty")
    return Question(
        id=_id(record, location),
        image=image,
        question=annotations.require_text(record, "question", location),
        answer=answer,
        choices=choices,
        answer_index=answer_index,
        context=annotations.require_text(record, "context", location) if "context" in record else "",
    )


def _image_path(text: str, location: str, base: Path) -> Path:
    if reason := file_kinds.explain_no_path(text):
        raise UserError(f"{location}: 'image' {reason}")
    image = base / text
    if not annotations.exists(image):
        hint = "; write / instead of \\ in paths" if "\\" in text else ""
        raise UserError(
            f"{location}: image {image} is missing; paths are relative to the folder of the .jsonl file{hint}"
        )
    return image


def _answer_index(record: Mapping[str, Any], choices: tuple[str, ...], location: str) -> int:
    """Return the index of the correct choice, given as an index or as the text of exactly one choice."""
    answer = record.get("answer")
    if not isinstance(answer, str):
        return annotations.require_answer_index(record, choices, location)
    if choices.count(answer) > 1:
        raise UserError(f"{location}: several choices read {annotations.quote(answer)}; give 'answer' as a number")
    if answer not in choices:
        raise UserError(
            f"{location}: 'answer' is {annotations.quote(answer)}, which is none of "
            f"{annotations.quote(list(choices), 400)}"
        )
    return choices.index(answer)


def _id(record: Mapping[str, Any], location: str) -> str:
    value = record.get("id", location.rpartition(":")[2])
    if not isinstance(value, str | int) or isinstance(value, bool) or value == "":
        raise UserError(f"{location}: 'id' must be a text or a whole number but is {annotations.quote(value)}")
    return str(value)


def _split(questions: Sequence[Question], hashes: Mapping[Path, ImageHashes], file: Path) -> dict[str, list[Question]]:
    """Divide the questions into train, val and test by the content of their images.

    Images with equal pixels stay together. Their order is that of the hashes of their bytes, because a decoder may give
    other pixels on another machine.
    """
    order: dict[str, str] = {}  # hash of the pixels → smallest hash of a file with these pixels
    for question in questions:
        image = hashes[question.image]
        order[image.pixels] = min(image.file, order.get(image.pixels, image.file))
    contents = sorted(order, key=order.__getitem__)
    if len(contents) < len(SPLITS):
        raise UserError(f"{file} has {len(contents)} different images, too few for train, val and test; give 3 or more")
    counts = {split: max(1, round(len(contents) * HELD_OUT[split])) for split in HELD_OUT}
    val_end, test_end = counts["val"], counts["val"] + counts["test"]
    parts = {"train": contents[test_end:], "val": contents[:val_end], "test": contents[val_end:test_end]}
    split_of = {content: split for split, part in parts.items() for content in part}
    return {split: [q for q in questions if split_of[hashes[q.image].pixels] == split] for split in SPLITS}


def _image_name(image: Path, source: Source) -> str:
    """Return the image's path in the prepared folder: as in the source, or in `images/` if it is outside the source."""
    resolved = image.resolve()
    if not source.contains(image):
        return f"images/{_hash(str(resolved))[:16]}-{resolved.name}"
    if image.is_relative_to(source.folder) and ".." not in image.relative_to(source.folder).parts:
        return image.relative_to(source.folder).as_posix()
    return resolved.relative_to(source.folder.resolve()).as_posix()


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
