"""Reading annotation files: JSON and JSON lines whose every mistake is one sentence with file and line."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data.prompts import LETTERS
from blipfit.errors import UserError


def read_json(path: Path) -> Any:
    """Return what a JSON file holds."""
    return _parse(_read(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, record) of a file with one JSON object a line; empty lines are passed over."""
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}:{number}"
            yield where, mapping(_parse(line, str(path), number), where)


def mapping(value: Any, where: str) -> dict[str, Any]:
    """Return `value` if it is a JSON object."""
    if not isinstance(value, dict):
        raise UserError(f"{where}: expected an object {{…}} but found {_kind(value)}")
    return value


def listed(value: Any, where: str) -> list[Any]:
    """Return `value` if it is a JSON list."""
    if not isinstance(value, list):
        raise UserError(f"{where}: expected a list […] but found {_kind(value)}")
    return value


def text(record: Mapping[str, Any], key: str, where: str) -> str:
    """Return the text under `key`; it may be empty but not absent."""
    if key not in record:
        raise UserError(f"{where}: {key!r} is missing")
    if not isinstance(record[key], str):
        raise UserError(f"{where}: {key!r} must be text but is {_kind(record[key])}")
    return record[key]


def choices(record: Mapping[str, Any], where: str) -> tuple[str, ...]:
    """Return the texts under `choices`: at least one, at most one a letter."""
    found = record.get("choices")
    if not isinstance(found, list) or not all(isinstance(choice, str) for choice in found):
        raise UserError(f"{where}: 'choices' must be a list of texts")
    if not found:
        raise UserError(f"{where}: 'choices' is empty; give at least one choice")
    if len(found) > len(LETTERS):
        raise UserError(f"{where}: {len(found)} choices, but at most {len(LETTERS)} can be lettered")
    return tuple(found)


def index(record: Mapping[str, Any], choices: Sequence[str], where: str) -> int:
    """Return the number under `answer`, a place in `choices` counted from 0."""
    answer = record.get("answer")
    if not isinstance(answer, int) or isinstance(answer, bool):
        raise UserError(f"{where}: 'answer' must be a choice's number, counted from 0, but is {answer!r}")
    if not 0 <= answer < len(choices):
        count = "1 choice" if len(choices) == 1 else f"{len(choices)} choices"
        there = "is" if len(choices) == 1 else "are"
        raise UserError(f"{where}: 'answer' is {answer} but there {there} {count} (counted from 0)")
    return answer


def find_image(tries: Sequence[Path], where: str, mend: str) -> Path:
    """Return the first path that is a file."""
    for path in tries:
        if path.is_file():
            return path
    looked = " and ".join(map(str, dict.fromkeys(tries)))
    raise UserError(f"{where}: its image is missing (looked for {looked}); {mend}")


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
        where = f"{file}:{line or error.lineno}"
        raise UserError(f"{where}: not valid JSON ({error.msg}, column {error.colno})") from None


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the number {value}")
