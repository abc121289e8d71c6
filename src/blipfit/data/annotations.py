"""Read annotation files (JSON, JSON lines) and validate their fields.

Every problem is a UserError of one sentence. `location` is its beginning: the file with a line or an entry.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blipfit.data.prompts import LETTERS
from blipfit.errors import UserError

_HALF_CHARACTER = re.compile("[\ud800-\udfff]")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises UserError if it is missing, not UTF-8, not valid JSON, or has a text with half a character.
    """
    return _parse(_decode(_read(path), str(path)), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (`file:line`, record) for every line of a file with one JSON object per line; empty lines are skipped.

    Raises UserError if the file is missing, or as `parse_line` does.
    """
    for location, line in split_lines(path):
        yield location, parse_line(line, location)


def split_lines(path: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (`file:line`, line) for every line of a JSON lines file that is not empty.

    Raises UserError if the file is missing, is not UTF-8, or is one JSON value over several lines.
    """
    content = _read(path).removeprefix(b"\xef\xbb\xbf")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}:1: not UTF-8 text but UTF-16; save the file as UTF-8")
    _require_lines(content, path)
    for number, line in enumerate(content.split(b"\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", line


def parse_line(line: bytes, location: str) -> dict[str, Any]:
    """Return the object of one line; `location` is `file:line`.

    Raises UserError if it is not UTF-8, not a JSON object, or has a text with half a character.
    """
    file, _, number = location.rpartition(":")
    return require_object(_parse(_decode(line, file, int(number)), file, int(number)), location)


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
        raise UserError(f"{location}: 'answer' must be a choice's number, counted from 0, but is {quote(answer)}")
    if not 0 <= answer < len(choices):
        count = "1 choice" if len(choices) == 1 else f"{len(choices)} choices"
        verb = "is" if len(choices) == 1 else "are"
        raise UserError(f"{location}: 'answer' is {quote(answer)} but there {verb} {count} (counted from 0)")
    return answer


def find_image(paths: Sequence[Path], location: str, fix: str) -> Path:
    """Return the first of `paths` that is a file.

    Raises UserError if there is none; `fix` is the end of its message and says what the user can do.
    """
    for path in paths:
        if exists(path):
            return path
    listing = " and ".join(map(str, dict.fromkeys(paths)))
    raise UserError(f"{location}: its image is missing (looked for {listing}); {fix}")


def exists(path: Path) -> bool:
    """Return whether a path leads to something that is no folder; False for what no path can be.

    Devices and other special files count: `images.read_image` says what they are.
    """
    try:
        return path.exists() and not path.is_dir()
    except (OSError, ValueError):  # too long, not permitted, a zero byte
        return False


def quote(value: Any, length: int = 80) -> str:
    """Return a value as Python writes it, cut to `length` characters, for a message."""
    text = repr(value[: length + 1] if isinstance(value, str | list | tuple) else value)
    return text if len(text) <= length + 2 else f"{text[:length]}…"


def require_whole_characters(text: str, what: str) -> None:
    """Raise UserError if a text has half a character (a lone surrogate), which cannot be written as UTF-8.

    `what` is the beginning of the message. Arguments of the command line that are not UTF-8 have such characters.
    """
    if half := _HALF_CHARACTER.search(text):
        raise UserError(f"{what} holds half a character (\\u{ord(half[0]):04x}); write it again as UTF-8 text")


def _read(path: Path) -> bytes:
    try:
        if path.exists() and not path.is_file():
            raise UserError(f"{path} cannot be read: it is not a regular file")
        return path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None


def _decode(content: bytes, file: str, first_line: int = 1) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + error.object.count(b"\n", 0, error.start)
        raise UserError(f"{file}:{line}: not UTF-8 text; save the file as UTF-8") from None


def _require_lines(content: bytes, path: Path) -> None:
    """Raise UserError if a JSON lines file is one list, or one object that is written over several lines."""
    start = content.lstrip()[:1]
    if start not in (b"[", b"{") or (start == b"{" and _parses(content.lstrip().split(b"\n", 1)[0])):
        return
    if b"\n" not in content.strip() and start == b"{":
        return
    if _parses(content):
        kind, selector = ("list", "'.[]'") if start == b"[" else ("object over several lines", ".")
        raise UserError(
            f"{path} is one JSON {kind}, but one JSON object per line is expected: convert it, for example with "
            f"`jq -c {selector} FILE > NEW.jsonl`"
        )


def _parses(content: bytes) -> bool:
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(content: str, file: str, line: int | None = None) -> Any:
    def build_object(fields: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(fields)
        if len(value) < len(fields):
            (key, _), *_ = Counter(key for key, _ in fields).most_common(1)
            location = f"{file}:{line}" if line else file
            raise UserError(f"{location}: an object names {key[:40]!r} twice; remove one of the two entries")
        return value

    try:
        value = json.loads(content, object_pairs_hook=build_object)
    except json.JSONDecodeError as error:
        location = f"{file}:{line or error.lineno}"
        if line and error.msg == "Extra data" and content[error.pos :].strip() == ",":
            raise UserError(f"{location}: a comma follows the object; remove the comma at the line's end") from None
        raise UserError(f"{location}: not valid JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise UserError(f"{file}:{line or 1}: not valid JSON (lists or objects are nested too deeply)") from None
    except ValueError:
        digits = "a number has too many digits"  # Python's limit is 4300
        raise UserError(f"{file}:{line or _line_of_long_number(content)}: not valid JSON ({digits})") from None
    if "\\ud" in content or "\\uD" in content:  # only an escape can give half a character
        _require_whole_characters_in(value, f"{file}:{line}" if line else file)
    return value


def _line_of_long_number(content: str) -> int:
    number = re.search(r"\d{4301}", content)
    return 1 if number is None else content.count("\n", 0, number.start()) + 1


def _require_whole_characters_in(value: Any, location: str, name: str = "text") -> None:
    """Raise UserError if a text anywhere in a JSON value has half a character; `name` is the field of the value."""
    if isinstance(value, str):
        require_whole_characters(value, f"{location}: {name}")
    elif isinstance(value, list):
        for item in value:
            _require_whole_characters_in(item, location, name)
    elif isinstance(value, dict):
        for key, item in value.items():
            _require_whole_characters_in(key, location, f"key {key!r}")
            _require_whole_characters_in(item, location, repr(key))


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return kinds.get(type(value), f"the number {quote(value)}")
