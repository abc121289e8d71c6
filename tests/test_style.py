"""Rules of style that a script can check: names, sizes, spelling, comments (CONTRIBUTING.md)."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import blipfit

SOURCE = Path(blipfit.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
VAGUE_NAMES = frozenset(["one", "found", "chosen", "asked", "told", "made", "wanted", "kept", "drawn", "said", "shown"])
"""Pronouns and participles: they do not say what a variable holds."""
MAX_VAGUE_NAMES = 0
MAX_FUNCTION_LINES, MAX_FILE_LINES = 50, 400


def names(tree: ast.AST) -> Iterator[str]:
    """Names of variables, arguments, attributes, functions and classes."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.arg(arg=name) | ast.Attribute(attr=name):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.keyword(arg=str() as name):
                yield name


@pytest.fixture(params=FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def text(request: pytest.FixtureRequest) -> str:
    return request.param.read_text(encoding="utf-8")


def test_names_say_what_they_hold(text):
    vague = [name for name in names(ast.parse(text)) if name in VAGUE_NAMES]
    assert len(vague) <= MAX_VAGUE_NAMES, vague


def test_files_and_functions_are_short(text):
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef)]
    long = {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= MAX_FUNCTION_LINES}
    assert long == {}
    assert text.count("\n") <= MAX_FILE_LINES


def test_spelling_is_american_and_comments_are_no_banners(text):
    text = text.replace("color colour compare", "")  # words in the miniatures' vocabulary
    assert re.findall(r"(?i)\b\w*(?:optimis|colour|grey|normalis|neighbour|behaviour)\w*", text) == []
    assert re.findall(r"(?m)^\s*# ?[-=]{4,}.*$", text) == []
