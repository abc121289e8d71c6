"""Which columns of a table hold the images, questions and answers, and how a row becomes entries of own data."""

import difflib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from blipfit.data import annotations, own_conversations
from blipfit.errors import UserError

NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "images", "img", "image_path", "file_name"),
    "question": ("question", "prompt", "query", "text", "instruction"),
    "choices": ("choices", "options"),
    "answer": ("answer", "answers", "label", "response", "caption", "output"),
    "context": ("context", "hint"),
    "id": ("id",),
    "conversation": ("conversation", "conversations", "messages"),
}
"""What a column can hold, and the names by which it is recognized, in any case."""
TURN_PARTS = ("question", "choices", "answer", "context")
"""What comes from the turns of a conversation, if there is one."""
CAPTION_QUESTION = "A short image description:"
"""The question of data without questions: the words of the prompt `caption-v1`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """The recognized columns of a table."""

    names: Mapping[str, str]
    """Name of the column by what it holds: a key of NAMES."""
    ignored: tuple[str, ...] = ()
    """Columns that are not read."""


@dataclass(slots=True)
class RowReader:
    """Turns rows into entries with the keys of own data, and counts what is special about them.

    `is_text`: all values are texts, as in CSV: choices are then JSON lists, and an answer can be a choice's number.
    """

    columns: Columns
    is_text: bool = False
    counts: Counter[str] = field(default_factory=Counter)

    def read(self, row: Mapping[str, Any], number: int, location: str) -> Iterator[dict[str, Any]]:
        """Yield the entries of a row: one, or one per turn of a conversation; without id it is the row's number.

        Raises UserError if a conversation or the choices cannot be read.
        """
        values = {part: row.get(name) for part, name in self.columns.names.items()}
        values = {part: value for part, value in values.items() if value is not None}
        if self.is_text:
            values = {part: value for part, value in values.items() if value != "" or part == "question"}
        values.setdefault("id", str(number))
        if "conversation" in self.columns.names:
            yield from self._read_conversation(values, location)
            return
        if "question" not in self.columns.names:
            values["question"] = CAPTION_QUESTION
        if self.is_text and "choices" in values:
            values["choices"] = _parse_choices(values["choices"], location)
        if not values.get("choices"):
            values.pop("choices", None)
        if "answer" in values:
            values["answer"] = self._answer(values["answer"], values.get("choices"), location)
        yield values

    def format_notes(self) -> list[str]:
        """Return sentences for the report on what the prepared folder cannot hold or holds in another form."""
        notes = []
        if count := self.counts["several answers"]:
            notes.append(f"{count} entries have several answers: the first is kept, the others are not stored")
        if count := self.counts["several turns"]:
            notes.append(f"{count} conversations have several turns: one question per turn, earlier turns as context")
        if not self.columns.names.keys() & {"question", "conversation"}:
            notes.append("there are no questions: train with --set data.prompt=caption-v1, which needs none")
        return notes

    def _answer(self, answer: Any, choices: Sequence[Any] | None, location: str) -> Any:
        if isinstance(answer, list):
            if len(answer) > 1 and choices:
                raise UserError(f"{location}: 'answer' holds {len(answer)} answers, but only one choice can be correct")
            self.counts["several answers"] += len(answer) > 1
            answer = answer[0] if answer else ""
        if isinstance(answer, dict) and "answer" in answer:  # VQAv2
            answer = answer["answer"]
        is_number = isinstance(answer, int) and not isinstance(answer, bool)
        if choices is None:
            return str(answer) if is_number else answer
        is_index = self.is_text and answer not in choices and answer.isascii() and answer.isdecimal()
        return int(answer) if is_index and len(answer) < 10 else answer

    def _read_conversation(self, values: dict[str, Any], location: str) -> Iterator[dict[str, Any]]:
        turns, images = own_conversations.read_turns(values.pop("conversation", None), location)
        if images:
            values.setdefault("image", images)
        self.counts["several turns"] += len(turns) > 1
        for number, turn in enumerate(turns, start=1):
            entry = {**values, "question": turn.question, "answer": turn.answer}
            if turn.context:
                entry["context"] = turn.context
            if len(turns) > 1:
                entry["id"] = f"{values['id']}-{number}"
            yield entry


def recognize(names: Sequence[str], assignments: Mapping[str, str], table: str) -> Columns:
    """Return what the columns hold: as `assignments` say, and the others by their names.

    An assignment to an empty name leaves that part out. `table` is the beginning of a message. Raises UserError if a
    column is missing, or if two names fit.
    """
    for part, name in assignments.items():
        if name and name not in names:
            raise UserError(f"{table} has no column {name!r} for --columns {part}={name}; {_listing(names)}")
    columns = {part: name for part, name in assignments.items() if name}
    candidates = {}
    for part, usual_names in NAMES.items():
        if part not in assignments:
            candidates[part] = [n for n in names if n.lower() in usual_names and n not in columns.values()]
    if "conversation" in columns or candidates.get("conversation"):
        candidates = {part: matches for part, matches in candidates.items() if part not in TURN_PARTS}
    elif not candidates.get("answer", ["-"]) and [n.lower() for n in candidates.get("question", ())] == ["text"]:
        candidates["answer"] = candidates.pop("question")  # images with one text: captions
    for part, matches in candidates.items():
        if len(matches) > 1:
            raise UserError(
                f"{table}: {' and '.join(matches)} can all hold the {part}; give the one to use with --columns "
                f"{part}={matches[0]} ({_listing(names)})"
            )
        if matches:
            columns[part] = matches[0]
    required = ("image", "answer") if "conversation" not in columns else ()
    for part in required:
        if part not in columns:
            raise UserError(
                f"{table}: no column is recognized as {part} (usual names: {', '.join(NAMES[part])}); name it with "
                f"--columns {part}=NAME ({_listing(names)})"
            )
    columns = {part: columns[part] for part in NAMES if part in columns}
    return Columns(columns, tuple(name for name in names if name not in columns.values()))


def parse_assignments(text: str | None) -> dict[str, str]:
    """Return the column by what it holds, from `image=path,question=prompt`; raises UserError if it is malformed."""
    assignments: dict[str, str] = {}
    for item in text.split(",") if text else ():
        part, equals, name = (piece.strip() for piece in item.partition("="))
        if not equals or part in assignments:
            problem = "is given twice" if equals else "is no assignment"
            raise UserError(f"--columns: {item.strip()!r} {problem}; write image=NAME,question=NAME,answer=NAME")
        if part not in NAMES:
            near = difflib.get_close_matches(part, NAMES, n=1, cutoff=0.5)
            fix = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"
            raise UserError(f"--columns: unknown part {part!r}; {fix}")
        assignments[part] = name
    return assignments


def shorten(entry: Mapping[str, Any]) -> dict[str, str]:
    """Return an entry as short texts, as an example for a person."""
    image = entry.get("image")
    while isinstance(image, list) and image:
        image = image[0]
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    texts = {key: value if isinstance(value, str) else str(value) for key, value in entry.items()}
    texts["image"] = f"{len(image)} bytes" if isinstance(image, bytes) else str(image or "in the messages")
    return {key: text if len(text) <= 80 else f"{text[:79]}…" for key, text in texts.items()}


def _parse_choices(text: Any, location: str) -> list[Any]:
    try:
        choices = json.loads(text)
    except ValueError:
        choices = None
    if not isinstance(choices, list):
        raise UserError(
            f'{location}: \'choices\' must be a JSON list such as ["red", "blue"] but is {annotations.quote(text)}'
        )
    return choices


def _listing(names: Sequence[str]) -> str:
    return f"columns: {', '.join(names[:30])}{', …' if len(names) > 30 else ''}"
