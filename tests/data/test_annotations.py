"""Annotation files: encodings, limits of JSON, and values in messages."""

import json
from pathlib import Path

import pytest

from blipfit.data import annotations
from blipfit.errors import UserError


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, r"x\.json:1: not valid JSON \(lists or objects are nested too deeply\)"),
        ('{"a": ' * 100_000, r"x\.json:1: not valid JSON \(lists or objects are nested too deeply\)"),
        ('{\n"a": ' + "7" * 5000 + "}", r"x\.json:2: not valid JSON \(a number has too many digits\)"),
        ('{"a": [{"text": "\\ud83d"}]}', r"x\.json: 'text' holds half a character \(\\ud83d\)"),
        ('{"a\\uDE00": 1}', r"x\.json: key 'a\\ude00' holds half a character \(\\ude00\)"),
        ('["\\ud800\\ud800"]', r"x\.json: text holds half a character"),
    ],
)
def test_limits_of_json(tmp_path: Path, content: str, message: str):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=message):
        annotations.read_json(tmp_path / "x.json")


def test_both_halves_of_a_character_are_one(tmp_path: Path):
    (tmp_path / "x.json").write_text('["\\ud83d\\ude00", "\\\\ud83d"]')
    assert annotations.read_json(tmp_path / "x.json") == ["\U0001f600", "\\ud83d"]


@pytest.mark.parametrize(
    ("content", "line"), [(b'{"a": 1}\n{"a": "\xe9"}\n', 2), ("é".encode("latin-1"), 1), ("{}".encode("utf-16"), 1)]
)
def test_other_encodings_are_named_with_their_line(tmp_path: Path, content: bytes, line: int):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=rf"x\.jsonl:{line}: not UTF-8 text"):
        list(annotations.read_lines(tmp_path / "x.jsonl"))


@pytest.mark.parametrize(
    ("value", "kind"), [([{"a": 1}, {"a": 2}], "list"), ({"a": 1}, "object over several lines"), ([], "list")]
)
def test_one_json_value_is_not_called_invalid(tmp_path: Path, value: object, kind: str):
    (tmp_path / "x.jsonl").write_text(json.dumps(value, indent=2))
    with pytest.raises(UserError, match=rf"x\.jsonl is one JSON {kind}, .*jq -c"):
        list(annotations.read_lines(tmp_path / "x.jsonl"))


def test_a_list_on_one_line_is_named(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('[{"a": 1}, {"a": 2}]\n')
    with pytest.raises(UserError, match="is one JSON list"):
        list(annotations.read_lines(tmp_path / "x.jsonl"))


def test_a_comma_between_lines_is_named(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 1} ,\n{"a": 2}\n')
    with pytest.raises(UserError, match=r"x\.jsonl:2: a comma follows the object; remove"):
        list(annotations.read_lines(tmp_path / "x.jsonl"))


def test_one_object_on_one_line(tmp_path: Path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}')
    assert [record for _, record in annotations.read_lines(tmp_path / "x.jsonl")] == [{"a": 1}]


def test_special_files_are_not_read(tmp_path: Path):
    for path in (Path("/dev/zero"), tmp_path):
        with pytest.raises(UserError, match="is not a regular file"):
            annotations.read_json(path)


@pytest.mark.parametrize("name", ["a\0b", "x" * 300, "\ud800", "none"])
def test_what_cannot_exist(tmp_path: Path, name: str):
    assert not annotations.exists(tmp_path / name)


def test_long_values_are_cut_in_messages():
    assert annotations.quote("x" * 10_000) == f"'{'x' * 79}…"
    assert len(annotations.quote(["x" * 10_000] * 1000)) < 90
    assert annotations.quote("short") == "'short'"
