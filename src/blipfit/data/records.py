"""Read annotation files (JSON, JSON lines) and validate their fields.

Every problem is a UserError of one sentence. `location` is its beginning: the file with a line or an entry.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data.prompts import LETTERS
from blipfit.errors import UserError


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises UserError if it is missing, not UTF-8 or not valid JSON."""
    return _parse(_read(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, record) for every line of a file with one JSON object per line; empty lines are skipped.

    Raises UserError if the file is missing, not UTF-8 or has a line that is not a JSON object.
    """
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            location = f"{path}:{number}"
            yield location, require_object(_parse(line, str(path), number), location)


def require_object(value: Any, location: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object; raises UserError otherwise."""
    if not isinstance(value, dict):
        raise UserError(f"{location}: expected an object {{…}} but found {_kind(value)}")
    return value


def require_list(value: Any, location: str) -> list[Any]:
    """Return `value` if it is a JSON list; raises UserError otherwise."""
    if not isinstance(value, list):
        raise UserError(f"{location}: expected a list […] but found {_kind(value)}")
    return value


def require_text(record: Mapping[str, Any], key: str, location: str) -> str:
    """Return the text of field `key`, which may be empty; raises UserError if it is missing or not text."""
    if key not in record:
        raise UserError(f"{location}: {key!r} is missing")
    if not isinstance(record[key], str):
        raise UserError(f"{location}: {key!r} must be text but is {_kind(record[key])}")
    return record[key]


def require_choices(record: Mapping[str, Any], location: str) -> tuple[str, ...]:
    """Return the texts of field `choices`; raises UserError unless there are 1 to 26 texts."""
    choices = record.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{location}: 'choices' must be a list of texts")
    if not choices:
        raise UserError(f"{location}: 'choices' is empty; give at least one choice")
    if len(choices) > len(LETTERS):
        raise UserError(f"{location}: 'choices' has {len(choices)} texts; at most {len(LETTERS)} are possible (a to z)")
    return tuple(choices)


def require_answer_index(record: Mapping[str, Any], choices: Sequence[str], location: str) -> int:
    """Return field `answer`, the index of the correct choice; raises UserError if it is not a valid index."""
    answer = record.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise UserError(f"{location}: 'answer' must be a choice's number, counted from 0, but is {answer!r}")
    if not 0 <= answer < len(choices):
        count = "1 choice" if len(choices) == 1 else f"{len(choices)} choices"
        verb = "is" if len(choices) == 1 else "are"
        raise UserError(f"{location}: 'answer' is {answer} but there {verb} {count} (counted from 0)")
    return answer


def find_image(paths: Sequence[Path], location: str, fix: str) -> Path:
    """Return the first of `paths` that is a file.

    Raises UserError if there is none; `fix` is the end of its message and says what the user can do.
    """
    for path in paths:
        if path.is_file():
            return path
    listing = " and ".join(map(str, dict.fromkeys(paths)))
    raise UserError(f"{location}: its image is missing (looked for {listing}); {fix}")


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _parse(content: str, file: str, line: int | None = None) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        location = f"{file}:{line or error.lineno}"
        raise UserError(f"{location}: not valid JSON ({error.msg}, column {error.colno})") from None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the number {value}")
