"""Commands on hostile files and arguments: exit code 2, one short line, and nothing left behind."""

import io
import json
import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from itertools import pairwise
from pathlib import Path
from unittest import mock

import pytest
import yaml
from hypothesis import strategies as st
from PIL import Image

from blipfit import __main__ as entry_point
from blipfit import grid
from hostile_inputs import changed, changed_bytes, json_lines, texts

LINES = [{"image": f"{name}.png", "question": "What?", "answer": "x", "id": name} for name in "abcd"]
RECIPE = grid.recipe("icons", 60, "tiny").model_dump(mode="json")
MEMORY = 4 * 2**30


CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def run(*arguments: str) -> tuple[int, str, str]:
    """Run a command in this process: exit code, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["blipfit", *arguments]), redirect_stdout(out), redirect_stderr(err):
        try:
            entry_point.main()
        except SystemExit as error:
            return error.code, out.getvalue(), err.getvalue()
    raise AssertionError("main() returned")


def check(*arguments: str) -> bool:
    """Whether a command succeeds; if not, it prints one short line without control characters."""
    code, out, err = run(*arguments)
    assert not CONTROL.search(out + err)
    assert code in (0, 2), err
    if code == 2:
        assert out == ""
        assert err.startswith("blipfit: ")
        assert err.count("\n") == 1
        assert len(err) < 1000
    return code == 0


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    for number, name in enumerate("abcd"):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{name}.png")
    return folder


def is_argument(text: str) -> bool:
    """Whether a text can be an argument of a process."""
    return "\0" not in text and not text.startswith("-") and len(text) < 100_000


def test_prepare(for_all, source, tmp_path):
    file, to = source / "my.jsonl", tmp_path / "to"

    def check_file(content: bytes, image: bytes) -> None:
        file.write_bytes(content)
        (source / "a.png").write_bytes(image)
        succeeded = check("prepare", "own", "--from", str(file), "--to", str(to))
        assert to.exists() == succeeded
        assert len(list(tmp_path.iterdir())) == 1 + succeeded
        if succeeded:
            to.rename(source / f"to{len(list(source.iterdir()))}")

    valid = (source / "a.png").read_bytes()
    for_all(20, check_file, json_lines(LINES), st.just(valid) | changed_bytes(valid))


def test_recipe_files_and_assignments(for_all, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def check_recipe(recipe: object, assignment: str) -> None:
        Path("r.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=False))
        check("train", "r.yaml", "--data", "absent")
        check("show", "icons", "60", "--model", "tiny", "--set", assignment)
        assert sorted(os.listdir()) == ["r.yaml"]

    for_all(8, check_recipe, changed(RECIPE), texts().filter(is_argument).map("experiment={}".format))


def test_names(for_all, tmp_path, monkeypatch):
    """Any text as the name of a data set, file, folder or benchmark is refused."""
    monkeypatch.chdir(tmp_path)
    places: list[Callable[[str], list[str]]] = [
        lambda name: ["prepare", name, "--from", "x"],
        lambda name: ["prepare", "own", "--from", f"absent/{name}", "--to", "to"],
        lambda name: ["score", "mme", f"absent/{name}"],
        lambda name: ["score", name, "x"],
        lambda name: ["show", "icons", name],
        lambda name: ["ablation", f"absent/{name}"],
        lambda name: [name],
        lambda name: ["grid", f"--{name}"],
    ]

    def check_name(place: Callable[[str], list[str]], name: str) -> None:
        if not check(*place(name)):
            assert os.listdir() == []

    for_all(25, check_name, st.sampled_from(places), texts().filter(is_argument))


def png(width: int, height: int, extra: bytes = b"") -> bytes:
    """A PNG file with few bytes of pixels; `extra`: further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(10_000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


BOMB = "a: &a [l, l]\n" + "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in pairwise("abcdefghijkl"))
WORST_RECIPES = {"bomb.yaml": BOMB + "experiment: *l\n", "nested.yaml": "[" * 90_000}
WORST_LINES = {
    "deep": "[" * 5_000_000,
    "list": '{"a": [' + "1," * 3_000_000 + "1]}",
    "digits": '{"a": ' + "9" * 5_000_000 + "}",
    "key": '{"' + "x" * 5_000_000 + '": 1}',
    "image": json.dumps({"image": "x" * 5_000_000, "question": "q", "answer": "a"}),
    "choices": json.dumps({"image": "d.png", "question": "q", "choices": ["x" * 1_000_000] * 3, "answer": "y"}),
}
WORST_IMAGES = {
    "wide.png": png(2**31 - 1, 2**31 - 1),
    "large.png": png(90_000, 90_000),
    "text.png": png(9, 9, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(200_000_000)))),
    "large.gif": b"GIF89a\xff\xff\xff\xff\x80\0\0" + b"\0" * 6 + b",\0\0\0\0\xff\xff\xff\xff\0\x02\x02L\x01\0;",
    "large.bmp": b"BM" + struct.pack("<IHHIIiiHHIIiiII", 60, 0, 0, 54, 40, 2**30, 2**30, 1, 24, 0, 0, 0, 0, 0, 0),
    "large.ppm": b"P6 4000000000 4000000000 255\n",
}
LIMIT = f"import resource; resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))"
PROCESS = """
import contextlib, io, json, sys
from blipfit.__main__ import main
for arguments in json.loads(sys.stdin.read()):
    sys.argv, err = ["blipfit", *arguments], io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
            main()
    except SystemExit as error:
        print(json.dumps([error.code, err.getvalue()]))
"""


def write_lines(folder: Path, last_line: str) -> list[str]:
    """Write a data set with this line at its end; return the arguments of the command that prepares it."""
    folder.mkdir()
    for number, name in enumerate("abcd"):
        Image.new("RGB", (9, 9), (number, 0, 0)).save(folder / f"{name}.png")
    lines = [*map(json.dumps, LINES), last_line]
    (folder / "my.jsonl").write_text("\n".join(lines))
    return ["prepare", "own", "--from", str(folder / "my.jsonl"), "--to", str(folder / "to")]


def test_the_worst_files_take_little_memory(tmp_path):
    """A process that may have 4 GB of address space refuses each of them, without a traceback."""
    commands = {}
    for name, content in WORST_IMAGES.items():
        line = json.dumps({"image": name, "question": "q", "answer": "a"})
        commands[name] = write_lines(tmp_path / name.replace(".", "-"), line)
        (tmp_path / name.replace(".", "-") / name).write_bytes(content)
    for name, line in WORST_LINES.items():
        commands[name] = write_lines(tmp_path / name, line)
    for name, text in WORST_RECIPES.items():
        (tmp_path / name).write_text(text)
        commands[name] = ["train", str(tmp_path / name)]
    process = [sys.executable, "-c", f"{LIMIT}\n{PROCESS}"]
    ended = subprocess.run(
        process, input=json.dumps(list(commands.values())), capture_output=True, text=True, timeout=300
    )
    assert ended.stderr == ""
    endings = dict(zip(commands, map(json.loads, ended.stdout.splitlines()), strict=True))
    assert endings.pop("text.png") == [0, ""]  # its pixels are good
    assert {name: ending for name, ending in endings.items() if ending[0] != 2 or ending[1].count("\n") != 1} == {}
    assert [path.parent.name for path in tmp_path.glob("*/to")] == ["text-png"]


def test_the_limit_of_memory_is_real():
    process = [sys.executable, "-c", f"{LIMIT}\nbytearray({MEMORY})"]
    assert "MemoryError" in subprocess.run(process, capture_output=True, text=True).stderr
    assert resource.getrlimit(resource.RLIMIT_AS)[0] != MEMORY
