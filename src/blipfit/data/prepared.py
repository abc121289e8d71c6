"""What all `prepare` functions share: a folder that appears whole, images placed in it, a report."""

import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfit.data.images import open_image
from blipfit.errors import UserError


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What a preparation wrote and what it left out, and how the images came into the folder."""

    dataset: str
    folder: Path
    counts: Mapping[str, int]
    """Questions written, by split."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Problems not written, by reason."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Images by how they were placed: linked, copied, written, kept."""
    published: Mapping[str, int] = field(default_factory=dict)
    """Questions of the whole data set, by split, where they are known."""

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {_by_split(self.counts)} questions in {self.folder}"]
        if self.published and dict(self.published) != dict(self.counts):
            lines.append(f"  part of the whole set, which has {_by_split(self.published)}")
        lines += [f"  left out: {count} {reason}" for reason, count in self.left_out.items() if count]
        if placed := ", ".join(f"{count} {how}" for how, count in self.images.items() if count):
            lines.append(f"  images: {placed}")
        return "\n".join(lines)


class Folder:
    """A folder in the making: takes images and files, and counts how the images came in."""

    def __init__(self, root: Path, final: Path):
        self.root = root
        self.final = final
        self.placed: Counter[str] = Counter()

    def place(self, image: Path, name: str) -> None:
        """Bring an image in under `name`: a hard link where the file system allows one, else a copy.

        A link costs no space and survives that the source is deleted or moved. An image that lies at its
        final place already stays there.
        """
        if _same(image, self.final / name):
            self.placed["kept"] += 1
            return
        target = self._new(name)
        try:
            os.link(image.resolve(), target)
            self.placed["linked"] += 1
        except OSError:  # another file system, a read-only one, or files of another owner
            shutil.copyfile(image, target)
            self.placed["copied"] += 1

    def write_image(self, data: bytes, name: str) -> None:
        """Write an image file's bytes under `name`."""
        self._new(name).write_bytes(data)
        self.placed["written"] += 1

    def write_json(self, value: Any, name: str, **style: Any) -> None:
        """Write a JSON file under `name`; `style` goes to json.dumps."""
        self.write_text(json.dumps(value, **style), name)

    def write_text(self, content: str, name: str) -> None:
        """Write a text file under `name`."""
        self._new(name).write_text(content, encoding="utf-8")

    def _new(self, name: str) -> Path:
        target = self.root / name
        if ".." in target.parts or not target.is_relative_to(self.root):
            raise UserError(f"{name} lies outside the folder {self.final}; rename it in the source")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@contextmanager
def folder(to: Path, ours: Iterable[str]) -> Iterator[Folder]:
    """Yield a Folder that becomes `to` when the block ends well and vanishes when it does not.

    It is filled beside `to` and renamed. Where `to` is full already, every new file replaces its namesake by
    one rename and nothing else is touched; a full folder that holds none of the names in `ours` is refused.
    """
    _refuse_foreign(to, ours)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        holder = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        try:
            stage = holder / to.name
            stage.mkdir()
            yield Folder(stage, to)
            _publish(stage, to)
        finally:
            shutil.rmtree(holder, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror or error}") from None


def check_images(paths: Iterable[Path]) -> None:
    """Decode every image; the first that is missing or damaged is a UserError."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_decodes, paths):
            pass


def _decodes(path: Path) -> None:
    open_image(path)  # the picture is dropped here, so that a list of results does not hold them all


def _refuse_foreign(to: Path, ours: Iterable[str]) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"{to} is a file; give a folder with --to")
    there = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    if there and not any((to / name).exists() for name in ours):
        holds = ", ".join(there[:3]) + (", …" if len(there) > 3 else "")
        raise UserError(f"{to} holds other things ({holds}); give a new or empty folder with --to")


def _publish(stage: Path, to: Path) -> None:
    if not to.exists():
        os.replace(stage, to)
        return
    files = sorted(path for path in stage.rglob("*") if path.is_file())
    # Annotations last: until then the folder's old ones stay valid.
    for file in sorted(files, key=lambda path: path.suffix in (".json", ".jsonl")):
        target = to / file.relative_to(stage)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _same(one: Path, other: Path) -> bool:
    return other.exists() and one.samefile(other)


def _by_split(counts: Mapping[str, int]) -> str:
    return " / ".join(f"{count} {split}" for split, count in counts.items())
