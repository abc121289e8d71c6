"""A disk that is full at any moment: one sentence, nothing half written, and the same command finishes with room."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import command_server
import full_disk
from blipfit import data, disk_space
from blipfit.errors import UserError
from full_disk import Disk

MAGNITUDE = ("--importance", "magnitude")
KIB, MIB = 1024, 2**20
ROOM = 64 * MIB
TRAINING = ("--set", "training.max_epochs=1", "--set", "training.batch_size=8", "--set", "data.limit=16")


@dataclass(frozen=True)
class Sources:
    """What the commands read; none of it is on the small disk."""

    icons: Path
    own: Path


@dataclass(frozen=True)
class Command:
    """A command that writes below the folder `disk`, and the most that it writes at a time."""

    arguments: Callable[[Sources, Path], list[str | Path]]
    peak: int


def _training(command: str, *options: str) -> Callable[[Sources, Path], list[str | Path]]:
    def arguments(sources: Sources, disk: Path) -> list[str | Path]:
        folders = ["--data", sources.icons, "--results", disk / "results"]
        return [command, "icons", *options, "--model", "tiny-t5", *folders, *TRAINING]

    return arguments


COMMANDS = {
    "train": Command(_training("train", "28", "32"), 5 * MIB),
    "sweep": Command(_training("sweep", "28,32", "--bank", "1"), 4 * MIB),
    "prepare own": Command(lambda s, disk: ["prepare", "own", "--from", s.own, "--to", disk / "own"], 400 * KIB),
    "prepare icons": Command(lambda s, disk: ["prepare", "icons", "--questions", "20", "--to", disk / "i"], 6 * MIB),
    "features build": Command(
        lambda s, disk: ["features", "build", "--on", "icons", "--data", s.icons, "--store", disk / "store"], 2750 * KIB
    ),
    "evaluate": Command(
        lambda s, disk: ["evaluate", "tiny-t5", "--on", f"icons={s.icons}", "--limit", "128", "--results", disk / "r"],
        56 * KIB,
    ),
    "shrink": Command(
        lambda s, disk: ["shrink", "--model", "tiny-t5", "--layers", "2", *MAGNITUDE, "--to", disk / "new" / "small"],
        6600 * KIB,
    ),
}


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Sources:
    root = tmp_path_factory.mktemp("full_disk")
    data.prepare("icons", root / "icons", train=24, val=16, test=128)
    own = root / "own"
    own.mkdir()
    lines = []
    for number in range(48):
        Image.new("RGB", (60, 40), (number, 5 * number, 200)).resize((48, 48)).save(own / f"{number}.bmp")
        lines.append(json.dumps({"image": f"{number}.bmp", "question": f"What is {number}?", "answer": "blue"}))
    (own / "mine.jsonl").write_text("\n".join(lines) + "\n")
    return Sources(root / "icons", own / "mine.jsonl")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    """A disk at one place for all commands, because the place is in some files."""
    with full_disk.small_disk(tmp_path / "disk", ROOM) as small:
        yield small


def _without_times(value: Any) -> Any:
    """A JSON value without the fields that differ between two runs of one command."""
    if isinstance(value, dict):
        return {k: _without_times(v) for k, v in value.items() if k not in ("seconds", "created")}
    return [_without_times(v) for v in value] if isinstance(value, list) else value


def _contents(folder: Path) -> dict[str, Any]:
    """All files below a folder: bytes, or for JSON its values without times."""
    contents: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        content: Any = path.read_bytes()
        if path.suffix == ".json":
            content = _without_times(json.loads(content))
        if path.suffix == ".jsonl":
            content = [_without_times(json.loads(line)) for line in content.splitlines()]
        if path.suffix == ".safetensors":  # which writes the entries of its metadata in any order
            length = 8 + int.from_bytes(content[:8], "little")
            content = (json.loads(content[8:length]), content[length:])
        contents[str(path.relative_to(folder))] = content
    return contents


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path)


def _check(command: Command, disk: Disk, sources: Sources, sizes: list[int]) -> int:
    """Run a command on disks of these sizes, then with room; return how many of them were too small."""
    arguments = command.arguments(sources, disk.folder)
    first = command_server.run(arguments)
    assert first.code == 0, first.stderr
    expected, failures = _contents(disk.folder), 0
    for size in sizes:
        _empty(disk.folder)
        disk.resize(size)
        outcome = command_server.run(arguments, ignore_estimates=True)
        if outcome.code != 0:
            failures += 1
            lines = [line for line in outcome.stderr.splitlines() if line.startswith("blipfit: ")]
            assert outcome.code == 2, (size, outcome)
            assert len(lines) == 1, (size, outcome.stderr)
            assert "make room and run the same command again" in lines[0]
            assert "Traceback" not in outcome.stderr
            assert [path for path in disk.folder.rglob(".*") if path.is_dir()] == [], size
        disk.resize(ROOM)
        again = command_server.run(arguments)
        is_complete = outcome.code == 0 and "give a new folder with --to" in again.stderr  # shrink replaces nothing
        assert again.code == 0 or is_complete, (size, again.stderr)
        assert _contents(disk.folder) == expected, size
    return failures


@pytest.mark.parametrize(
    ("name", "shares"),
    [("train", [0.5]), ("prepare own", [0.02, 0.5]), ("features build", [0.5]), ("evaluate", [0.4]), ("shrink", [0.3])],
)
def test_a_full_disk_is_one_sentence_and_the_command_finishes_with_room(name, shares, disk: Disk, sources: Sources):
    command = COMMANDS[name]
    assert _check(command, disk, sources, [int(share * command.peak) for share in shares]) == len(shares)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_disk_that_is_full_at_any_moment(name, disk: Disk, sources: Sources):
    command = COMMANDS[name]
    count = 30
    failures = _check(command, disk, sources, [4096 + number * command.peak // count for number in range(count)])
    print(f"{name}: {failures} of {count} disks were too small")
    assert failures >= count // 2


@pytest.mark.parametrize("name", COMMANDS)
def test_too_little_room_is_refused_before_anything_is_written(name, disk: Disk, sources: Sources):
    command = COMMANDS[name]
    disk.resize(command.peak // 3)
    outcome = command_server.run(command.arguments(sources, disk.folder))
    assert outcome.code == 2, outcome
    assert "left: make room" in outcome.stderr
    files = [path.name for path in disk.folder.rglob("*") if path.is_file()]
    assert set(files) <= {"manifest.json"}, files  # a feature store's folder is created empty


def test_errors_of_all_kinds_are_recognized(tmp_path: Path):
    from safetensors import SafetensorError

    full = OSError(28, "No space left on device", "there/a.json")
    assert "there/a.json cannot be written" in str(disk_space.describe_full_disk(full))
    assert disk_space.is_disk_full(OSError(122, "Disk quota exceeded"))
    assert disk_space.is_disk_full(SafetensorError("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("a library gave up")
    wrapped.__cause__ = full
    assert disk_space.is_disk_full(wrapped)
    assert not disk_space.is_disk_full(OSError(13, "Permission denied"))
    assert not disk_space.is_disk_full(UserError("a question: No space left on device?"))


def test_free_space_is_that_of_the_nearest_folder(tmp_path: Path):
    missing = tmp_path / "a" / "b"
    assert disk_space.existing_folder(missing) == tmp_path
    disk_space.require_space(missing, 1, "files")
    with pytest.raises(UserError, match=r"files need .* TiB, but .*/a/b has only .* left: make room"):
        disk_space.require_space(missing, 2**60, "files")
    assert disk_space.file_bytes_on_disk([0, 1, 4096, 4097]) == 4 * 4096
