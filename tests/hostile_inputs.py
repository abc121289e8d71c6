"""Strategies of hostile inputs: valid files with a few faults, and texts and values that programs stumble over."""

import copy
import json
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from blipfit.errors import UserError

LONG = "x" * 100_000
TEXTS = (
    *("", " ", "\n", "\r\n", "a\tb", "\0", "a\0b", "\x1b[31mred", "\x1b]0;title\x07", "\x9b2J", "a\rb", "\u202eabc"),
    *("[/b]", "[bold]x", ":smile:", "\ud800", "a\udcffb", "\ufeff", "\u2028", "e\u0301" * 50, "\U0001f600"),
    *(
        "../x",
        "/etc/passwd",
        "/dev/zero",
        "/dev/null",
        ".",
        "..",
        "a/b",
        "~",
        "x" * 300,
        LONG,
        "data:image/png;base64,AA",
    ),
    *("1e999", "NaN", "null", "{}", "[", "%s%n", "$\\frac{", "&a", "*a", "!!python/object:os.system", "yes", "off"),
)
NUMBERS = (0, -1, 1, 2, 27, 2**31, 2**63, 2**64, 10**30, 10**400, -(10**30), 0.5, 1e308, -0.0)
NOT_FINITE = (float("nan"), float("inf"), float("-inf"))
BYTE_RUNS = (b"\0", b"\xff", b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\x80\0\0\0", b"\xff" * 8, b"\0\1")


def is_user_error(call: Callable[[], Any]) -> bool:
    """Call a function; whether it raised UserError. Every other exception is a fault."""
    try:
        call()
    except UserError:
        return True
    return False


def texts() -> st.SearchStrategy[str]:
    """Texts that are empty, long, half characters, control sequences, markup, paths, or random."""
    any_text = st.text(st.characters(exclude_categories=()), max_size=20)
    return st.sampled_from(TEXTS) | any_text


def values() -> st.SearchStrategy[Any]:
    """JSON values of every type."""
    simple = texts() | st.sampled_from(NUMBERS) | st.none() | st.booleans() | st.sampled_from(NOT_FINITE)
    nested = st.recursive(
        simple, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts(), inner, max_size=3)
    )
    deep = st.integers(1, 200).map(nest)
    return st.one_of(simple, st.just([]), st.just({}), deep, nested)


def nest(depth: int) -> list[Any]:
    """Lists inside each other."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def changed(draw: st.DrawFn, valid: Any, max_changes: int = 3) -> Any:
    """A JSON value with up to `max_changes` faults: an entry is missing, doubled, renamed, added or of another type."""
    value = copy.deepcopy(valid)
    for _ in range(draw(st.integers(0, max_changes))):
        holders = list(_holders(value))
        if not holders:
            return draw(values())
        holder = draw(st.sampled_from(holders))
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        key = draw(st.sampled_from(keys))
        match draw(st.sampled_from(["replace", "replace", "replace", "delete", "rename", "add", "empty"])):
            case "replace":
                holder[key] = draw(values())
            case "delete":
                del holder[key]
            case "empty":
                holder.clear()
            case "rename" | "add" if isinstance(holder, dict):
                holder[draw(texts())] = holder[key]
            case _:
                holder.append(copy.deepcopy(holder[key])) if isinstance(holder, list) else None
    return value


def _holders(value: Any) -> Any:
    """All lists and objects with entries in a JSON value."""
    if isinstance(value, dict | list) and value:
        yield value
        for item in value.values() if isinstance(value, dict) else value:
            yield from _holders(item)


@st.composite
def changed_bytes(draw: st.DrawFn, valid: bytes, max_changes: int = 3, max_position: int | None = None) -> bytes:
    """Bytes with up to `max_changes` faults: cut off, overwritten, inserted, removed or repeated somewhere."""
    data = bytearray(valid)
    for _ in range(draw(st.integers(0, max_changes))):
        start = draw(st.integers(0, min(len(data), max_position or len(data))))
        length = draw(st.sampled_from([1, 2, 4, 8, 40]))
        run = draw(st.sampled_from(BYTE_RUNS) | st.binary(min_size=1, max_size=8))
        match draw(st.sampled_from(["overwrite", "overwrite", "overwrite", "cut off", "insert", "remove", "repeat"])):
            case "overwrite":
                data[start : start + len(run)] = run
            case "cut off":
                del data[start:]
            case "insert":
                data[start:start] = run
            case "remove":
                del data[start : start + length]
            case "repeat":
                data[start:start] = data[start : start + length] * 3
    return bytes(data)


@st.composite
def json_files(draw: st.DrawFn, valid: Any) -> bytes:
    """The bytes of a JSON file: `valid` with faults, written in one of many ways, sometimes with faulty bytes."""
    value = draw(changed(valid))
    text = json.dumps(value, ensure_ascii=draw(st.booleans()), indent=draw(st.sampled_from([None, 2])))
    match draw(
        st.sampled_from([*["utf-8"] * 6, "bom", "crlf", "utf-16", "latin-1", "bytes", "deep", "digits", "twice"])
    ):
        case "bom":
            return b"\xef\xbb\xbf" + _encode(text)
        case "crlf":
            return _encode(text.replace("\n", "\r\n"))
        case "utf-16":
            return text.encode("utf-16", "surrogatepass")
        case "latin-1":
            return text.encode("latin-1", "replace") + b"\xe9"
        case "bytes":
            return draw(changed_bytes(_encode(text)))
        case "deep":
            return _encode(text.replace("null", "[" * 100_000, 1))
        case "digits":
            return _encode(text.replace("1", "9" * 5000, 1))
        case "twice":
            return _encode(text * 2)
    return _encode(text)


@st.composite
def json_lines(draw: st.DrawFn, valid: list[dict[str, Any]]) -> bytes:
    """The bytes of a JSON lines file: records with faults, sometimes a line that is anything else."""
    records = draw(changed(valid))
    records = records if isinstance(records, list) else [records]
    lines = [_encode(json.dumps(record, ensure_ascii=draw(st.booleans()))) for record in records]
    if draw(st.booleans()):
        lines.insert(draw(st.integers(0, len(lines))), draw(json_files(valid[0])))
    end = draw(st.sampled_from([b"\n", b"\n", b"\r\n", b"\r", b"\n\n", b",\n"]))
    return (
        draw(st.sampled_from([b"", b"", b"\xef\xbb\xbf", b"\n"]))
        + end.join(lines)
        + draw(st.sampled_from([b"", b"\n"]))
    )


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")
