"""The user's own data: one JSON object per line with `image, question, answer` and optionally `choices, context, id`.

`prepare` also reads other tables and conversations (`own_sources`, `own_columns`) and writes this form.

`answer` is the index of a choice, counted from 0, or its text; without `choices` it is free text. Image paths are
relative to the folder of the file. Transparency is shown on white.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from blipfit.data import annotations, own_columns, own_sources
from blipfit.data.own_images import UnpackedImages, require_image_file
from blipfit.data.question import SPLITS, Question
from blipfit.data.write_prepared import BAD_ENTRIES, ImageHashes, PrepareReport, Source, hash_images, output_folder
from blipfit.errors import UserError

KEYS = ("image", "question", "choices", "answer", "context", "id")
VAL_TEST_FRACTIONS = {"val": 0.1, "test": 0.1}
"""Fraction of the images in val and test when one file is split."""


Skip = Callable[[UserError], None]
"""Receives the error of an entry that is left out."""
FindImage = Callable[[Mapping[str, Any], str], Path]
"""Returns the image file of an entry at a location; raises UserError if there is none."""
Entry = tuple[str, Question]
"""Where a question is (`file:line`), and the question."""


def prepare(
    source: str | Path,
    to: Path,
    *,
    columns: str | None = None,
    allow_outside: bool = False,
    skip_bad: bool = False,
    announce: Callable[[Mapping[str, Any]], None] = lambda recognized: None,
) -> PrepareReport:
    """Check every entry and image, and write `{split}.jsonl` with the images beside them.

    `source` is a file or folder of a format in `own_sources`, or `hf://owner/name@revision`. A source without splits is
    divided 80/10/10 by the images' content: no image is in two splits, also not as a copy or under another path, and
    equal images give equal splits. Images outside the source need `allow_outside` and are copied. With `skip_bad`, bad
    entries and entries with bad images are left out and listed in the report and in BAD_ENTRIES.

    JSON lines in blipfit's form are read strictly. Of other tables, the columns are recognized by their names or by
    `columns` (`image=path,question=prompt,answer=label`), and `announce` receives what was recognized before anything
    is written. Raises UserError if columns, an entry or an image are invalid, or `to` cannot be written.
    """
    assignments = own_columns.parse_assignments(columns)
    files = own_sources.locate(source)
    bad: list[str] = []

    def skip(error: UserError) -> None:
        if not skip_bad:
            raise error
        bad.append(str(error))

    with UnpackedImages(to, files.folder if files.is_hub else None) as images:
        if files.format == "jsonl" and not assignments and all(_is_strict(f) for f in chain(*files.splits.values())):
            contents = EntriesOfTables(
                {split: _read_entries(file, skip, images) for split, (file,) in files.splits.items()}
            )
        else:
            contents = _read_tables(files, assignments, skip, images, announce)
        allowed = Source(files.folder, allow_outside, images.folder)
        return _write(source, to, contents, allowed, skip, bad if skip_bad else None)


@dataclass(slots=True)
class EntriesOfTables:
    """The entries of a source by split, or under the name `all`; with sentences for the report."""

    entries: dict[str, list[Entry]]
    notes: list[str] = field(default_factory=list)
    recognized: Mapping[str, Any] = field(default_factory=dict)
    """Format, columns and an example."""


def _write(
    source: str | Path, to: Path, contents: EntriesOfTables, allowed: Source, skip: Skip, bad: list[str] | None
) -> PrepareReport:
    """Write the prepared folder; `bad` are the entries that were left out, None if none may be."""
    hashes = _hash_images(contents.entries, allowed, skip)
    splits = {name: [q for _, q in part if q.image in hashes] for name, part in contents.entries.items()}
    if bad and not any(splits.values()):
        raise UserError(f"{source} has no entry that can be used; the first error: {bad[0]}")
    notes = list(contents.notes)
    splits = _complete_splits(splits, hashes, str(source), notes)
    names = {q.image: _image_name(q.image, allowed) for split in splits.values() for q in split}
    with output_folder(to, [f"{split}.jsonl" for split in SPLITS], allowed) as out:
        out.require_space(names)
        for name, image in {name: image for image, name in names.items()}.items():  # two paths can have one name
            out.add_image(image, name)
        for split, questions in splits.items():
            out.write_text("".join(_format_line(q, names[q.image]) for q in questions), f"{split}.jsonl")
        if bad is not None:
            out.write_text("".join(f"{line}\n" for line in bad), BAD_ENTRIES)
    counts = {split: len(questions) for split, questions in splits.items()}
    return PrepareReport(
        "own", to, counts, {}, out.image_counts, bad=bad or (), notes=notes, recognized=contents.recognized
    )


def _is_strict(file: Path) -> bool:
    """Return whether a JSONL file is in blipfit's form: by its first line that is an object, or if it has none."""
    for location, line in annotations.split_lines(file):
        try:
            return {"image", "question", "answer"} <= annotations.parse_line(line, location).keys()
        except UserError:
            continue
    return True


def _read_tables(
    files: own_sources.Files,
    assignments: Mapping[str, str],
    skip: Skip,
    images: UnpackedImages,
    announce: Callable[[Mapping[str, Any]], None],
) -> EntriesOfTables:
    """Read the tables of a source, which have the same columns; what a table lacks is missing in all its rows."""
    tables = own_sources.open_tables(files, skip)
    first = next(iter(tables.values()))
    names = list(dict.fromkeys(chain(*(table.columns for table in tables.values()))))
    columns = own_columns.recognize(names, assignments, first.name)
    reader = own_columns.RowReader(columns, first.is_text)
    contents = EntriesOfTables({split: [] for split in tables})
    contents.recognized = {"format": files.format, "columns": columns.names, "ignored": columns.ignored}
    for split, table in tables.items():
        ids: dict[str, str] = {}
        for row, entry in _read_rows(table, reader, skip):
            if "example" not in contents.recognized:
                contents.recognized = {**contents.recognized, "example": own_columns.shorten(entry)}
                announce(contents.recognized)
            try:
                image = images.resolve(entry.get("image"), row.location, row.base, f"the folder {row.base}")
                question = _question(entry, row.location, lambda *_, image=image: image)
                if question.id in ids:
                    raise UserError(
                        f"{row.location}: 'id' {question.id} is already used ({ids[question.id]}); number the entries "
                        "instead with --columns id="
                    )
            except UserError as error:
                skip(error)
                continue
            ids[question.id] = row.location
            contents.entries[split].append((row.location, question))
    contents.notes = reader.format_notes()
    return contents


def _read_rows(
    table: own_sources.Table, reader: own_columns.RowReader, skip: Skip
) -> Iterator[tuple[own_sources.Row, dict[str, Any]]]:
    for row in table.rows:
        try:
            for entry in reader.read(row.values, row.number, row.location):
                yield row, entry
        except UserError as error:
            skip(error)


def load(folder: Path, split: str) -> list[Question]:
    """Load `{split}.jsonl` of a folder; raises UserError if it is missing or a line or an image is invalid."""
    return read_questions(_split_file(folder, split))


def read_questions(file: Path) -> list[Question]:
    """Read one JSONL file; a question without `id` gets its line number as id.

    Raises UserError if a line is invalid, an image is missing or an id occurs twice.
    """
    return [question for _, question in _read_entries(file, _raise, None)]


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


def _read_entries(file: Path, skip: Skip, images: UnpackedImages | None) -> list[Entry]:
    """Read one JSONL file; `skip` receives the error of every invalid line.

    `images` receives images as base64 text; without it, every image must be a path.
    """

    def find_image(record: Mapping[str, Any], location: str) -> Path:
        text = annotations.require_text(record, "image", location)
        resolve = require_image_file if images is None else images.resolve
        return resolve(text, location, file.parent, "the folder of the .jsonl file")

    entries = []
    line_by_id: dict[str, str] = {}
    for location, line in annotations.split_lines(file):
        try:
            question = _question(annotations.parse_line(line, location), location, find_image)
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
                reason = str(result).replace(str(image), "the image") if source.is_unpacked(image) else str(result)
                skip(UserError(f"{location}: {reason}"))
    return hashes


def _count_shared(splits: Mapping[str, Sequence[Question]], hashes: Mapping[Path, ImageHashes]) -> int:
    """Return the number of images, by content, that are in more than one split."""
    contents = [{hashes[question.image].pixels for question in questions} for questions in splits.values()]
    return sum(sum(content in part for part in contents) > 1 for content in set().union(*contents))


def _question(record: Mapping[str, Any], location: str, find_image: FindImage) -> Question:
    for key in record:
        if key not in KEYS:
            similar = difflib.get_close_matches(key, KEYS, n=1)
            known = f"known: {', '.join(KEYS)} (`prepare own --columns` reads files with others)"
            fix = f"did you mean {similar[0]!r}?" if similar else known
            raise UserError(f"{location}: unknown key {annotations.quote(key)}; {fix}")
    image = find_image(record, location)
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


def _complete_splits(
    splits: dict[str, list[Question]], hashes: Mapping[Path, ImageHashes], source: str, notes: list[str]
) -> dict[str, list[Question]]:
    """Return train, val and test: as given, or divided by the content of the images; `notes` receives what was done."""
    if own_sources.UNSPLIT in splits:
        return _divide(splits[own_sources.UNSPLIT], hashes, source, VAL_TEST_FRACTIONS)
    held_out = [name for name in splits if name != "train"]
    if "train" not in splits or not held_out:
        raise UserError(f"{source} has the splits {', '.join(splits)}; expected train with validation, test or both")
    if len(held_out) == 1:
        (name,) = held_out
        halves = _divide(splits[name], hashes, f"{source} ({name})", {"val": 0.5, "test": 0.5})
        splits = {"train": splits["train"], "val": halves["val"], "test": halves["test"]}
        notes.append(f"the source has no {'test' if name == 'val' else 'val'}: {name} is halved by its images")
    if leaks := _count_shared(splits, hashes):
        notes.append(f"{leaks} images are in more than one split")
    return {split: splits[split] for split in SPLITS}


def _divide(
    questions: Sequence[Question], hashes: Mapping[Path, ImageHashes], source: str, fractions: Mapping[str, float]
) -> dict[str, list[Question]]:
    """Divide the questions into splits by the content of their images; `fractions` are those of val and test.

    Images with equal pixels stay together. Their order is that of the hashes of their bytes, because a decoder may give
    other pixels on another machine.
    """
    order: dict[str, str] = {}  # hash of the pixels → smallest hash of a file with these pixels
    for question in questions:
        image = hashes[question.image]
        order[image.pixels] = min(image.file, order.get(image.pixels, image.file))
    contents = sorted(order, key=order.__getitem__)
    names = SPLITS if sum(fractions.values()) < 1 else tuple(fractions)
    if len(contents) < len(names):
        few = f"too few for {', '.join(names[:-1])} and {names[-1]}; give {len(names)} or more"
        raise UserError(f"{source} has {len(contents)} different images, {few}")
    val_end = max(1, round(len(contents) * fractions["val"]))
    test_end = val_end + max(1, round(len(contents) * fractions["test"]))
    parts = {"train": contents[test_end:], "val": contents[:val_end], "test": contents[val_end:test_end]}
    split_of = {content: split for split, part in parts.items() for content in part}
    return {split: [q for q in questions if split_of[hashes[q.image].pixels] == split] for split in SPLITS}


def _image_name(image: Path, source: Source) -> str:
    """Return the image's path in the prepared folder: as in the source, or in `images/` if it is outside the source."""
    if source.is_unpacked(image):
        return f"images/{image.name}"
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
