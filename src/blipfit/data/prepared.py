"""Write a prepared data set: an output folder that appears complete or not at all, its images, and a report."""

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
    """What a `prepare` function wrote and left out. `str(report)` is the text for the user."""

    dataset: str
    folder: Path
    counts: Mapping[str, int]
    """Number of questions written, by split."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of problems not written, by reason."""
    images: Mapping[str, int] = field(default_factory=dict)
    """Number of images by how they came into the folder: linked, copied, written or kept."""
    published: Mapping[str, int] = field(default_factory=dict)
    """Number of questions of the complete data set, by split, if known."""

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {_by_split(self.counts)} questions in {self.folder}"]
        if self.published and dict(self.published) != dict(self.counts):
            lines.append(f"  part of the whole set, which has {_by_split(self.published)}")
        lines += [f"  left out: {count} {reason}" for reason, count in self.left_out.items() if count]
        if images := ", ".join(f"{count} {action}" for action, count in self.images.items() if count):
            lines.append(f"  images: {images}")
        return "\n".join(lines)


class OutputFolder:
    """An output folder while it is being filled; counts how each image came into it.

    `root` is the temporary folder that receives the files, `final` the folder that it becomes.
    """

    def __init__(self, root: Path, final: Path):
        self.root = root
        self.final = final
        self.image_counts: Counter[str] = Counter()

    def add_image(self, image: Path, name: str) -> None:
        """Add an image file under `name`: as a hard link if the file system allows it, otherwise as a copy.

        A link takes no space and remains when the source is deleted or moved. An image that is already at its final
        place stays there. Raises UserError if `name` is outside the folder.
        """
        if _is_same_file(image, self.final / name):
            self.image_counts["kept"] += 1
            return
        target = self._new_file(name)
        try:
            os.link(image.resolve(), target)
            self.image_counts["linked"] += 1
        except OSError:  # another file system, a read-only one, or files of another owner
            shutil.copyfile(image, target)
            self.image_counts["copied"] += 1

    def write_image(self, data: bytes, name: str) -> None:
        """Add an image under `name`, from the bytes of its file."""
        self._new_file(name).write_bytes(data)
        self.image_counts["written"] += 1

    def write_json(self, value: Any, name: str, **options: Any) -> None:
        """Write a JSON file under `name`; `options` go to `json.dumps`."""
        self.write_text(json.dumps(value, **options), name)

    def write_text(self, content: str, name: str) -> None:
        """Write a text file under `name`."""
        self._new_file(name).write_text(content, encoding="utf-8")

    def _new_file(self, name: str) -> Path:
        target = self.root / name
        if ".." in target.parts or not target.is_relative_to(self.root):
            raise UserError(f"{name} is outside the folder {self.final}; rename it in the source data")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target


@contextmanager
def output_folder(to: Path, known_names: Iterable[str]) -> Iterator[OutputFolder]:
    """Yield an OutputFolder that becomes `to` if the block succeeds and is deleted if it raises an exception.

    It is filled in a temporary folder beside `to`, then renamed. If `to` has files already, every new file replaces the
    old one of the same name by a rename, and other files stay. Raises UserError if `to` has files but none of
    `known_names` (so it belongs to something else), or if it cannot be written.
    """
    _require_own_folder(to, known_names)
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{to.name}.", dir=to.parent))
        try:
            root = temporary / to.name
            root.mkdir()
            yield OutputFolder(root, to)
            _publish(root, to)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror or error}") from None


def check_images(paths: Iterable[Path]) -> None:
    """Decode every image; raises UserError for the first that is missing or damaged."""
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_image, paths):
            pass


def _check_image(path: Path) -> None:
    open_image(path)  # the image is not returned, so that not all of them are in memory at once


def _require_own_folder(to: Path, known_names: Iterable[str]) -> None:
    if to.exists() and not to.is_dir():
        raise UserError(f"{to} is a file; give a folder with --to")
    files = sorted(path.name for path in to.iterdir()) if to.is_dir() else []
    if files and not any((to / name).exists() for name in known_names):
        listing = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        raise UserError(f"{to} contains other files ({listing}); give a new or empty folder with --to")


def _publish(root: Path, to: Path) -> None:
    if not to.exists():
        os.replace(root, to)
        return
    files = sorted(path for path in root.rglob("*") if path.is_file())
    # Annotations last, so that the old annotations stay valid until the new images are complete.
    for file in sorted(files, key=lambda path: path.suffix in (".json", ".jsonl")):
        target = to / file.relative_to(root)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


def _is_same_file(image: Path, target: Path) -> bool:
    return target.exists() and image.samefile(target)


def _by_split(counts: Mapping[str, int]) -> str:
    return " / ".join(f"{count} {split}" for split, count in counts.items())
