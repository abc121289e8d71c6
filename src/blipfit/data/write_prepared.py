"""Write a prepared data set: an output folder that appears complete or not at all, its images, and a report."""

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfit import disk_space
from blipfit.data.images import Transparency, hash_pixels, large_file_lock, open_image, read_image
from blipfit.errors import UserError
from blipfit.file_writes import explaining_full_disk, flush, flush_entry, temporary_folder

MAX_LISTED = 20
"""Most bad entries that a report lists."""
BAD_ENTRIES = "left_out.txt"
"""In a prepared folder: the entries that `--skip-bad` left out, one per line."""


@dataclass(frozen=True, slots=True)
class Source:
    """The folder that a data set is read from; images outside of it are refused, or copied with `allow_outside`.

    `unpacked`: temporary folder with images that the data set holds in its tables; they are moved, not linked.
    """

    folder: Path
    allow_outside: bool = False
    unpacked: Path | None = None

    def contains(self, path: Path) -> bool:
        """Return whether a file is inside the folder, after all `..` and symbolic links."""
        return self.is_unpacked(path) or path.resolve().is_relative_to(self.folder.resolve())

    def is_unpacked(self, path: Path) -> bool:
        """Return whether a file is an image of the tables."""
        return self.unpacked is not None and path.parent == self.unpacked

    def check(self, path: Path) -> None:
        """Raise UserError if a file is outside the folder and that is not allowed."""
        if not self.allow_outside and not self.contains(path):
            resolved = path.resolve()
            target = "" if resolved == path else f" (it is {resolved})"
            raise UserError(
                f"{path} is outside the data folder {self.folder}{target}: move it into the folder, or allow it with "
                "--allow-outside, which copies it"
            )


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
    bad: Sequence[str] = ()
    """Entries that `--skip-bad` left out: file and line, with the reason."""
    notes: Sequence[str] = ()
    """Sentences on what is unusual in the data, e.g. empty questions."""
    recognized: Mapping[str, Any] = field(default_factory=dict)
    """Own data that is not in blipfit's form: its format, the columns by what they hold, and an example."""

    def __str__(self) -> str:
        lines = [f"{self.dataset}: {_by_split(self.counts)} questions in {self.folder}"]
        if self.published and dict(self.published) != dict(self.counts):
            lines.append(f"  part of the whole set, which has {_by_split(self.published)}")
        lines += [f"  left out: {count} {reason}" for reason, count in self.left_out.items() if count]
        lines += [f"  note: {note}" for note in self.notes]
        if images := ", ".join(f"{count} {action}" for action, count in self.images.items() if count):
            lines.append(f"  images: {images}")
        if self.bad:
            lines += [f"  left out: {len(self.bad)} bad entries", *(f"    {entry}" for entry in self.bad[:MAX_LISTED])]
        if len(self.bad) > MAX_LISTED:
            lines.append(f"    and {len(self.bad) - MAX_LISTED} more: {self.folder / BAD_ENTRIES}")
        return "\n".join(lines)


class OutputFolder:
    """An output folder while it is being filled; counts how each image came into it.

    `root` is the temporary folder that receives the files, `final` the folder that it becomes, `source` the folder that
    images come from.
    """

    def __init__(self, root: Path, final: Path, source: Source | None = None):
        self.root = root
        self.final = final
        self.source = source
        self.image_counts: Counter[str] = Counter()

    def require_space(self, images: Iterable[Path] = (), file_sizes: Iterable[int] = ()) -> None:
        """Raise UserError if the disk has no room for files that will be added: image files, and files of these bytes.

        An image of the source on the same disk is linked and takes no room.
        """
        copied = [image for image in dict.fromkeys(images) if not self._is_linkable(image)]
        needed = disk_space.file_bytes_on_disk([*file_sizes, *(image.stat().st_size for image in copied)])
        disk_space.require_space(self.final, needed, f"the files of {self.final}")

    def _is_linkable(self, image: Path) -> bool:
        is_own = self.source is None or self.source.contains(image)
        return is_own and disk_space.is_same_disk(image.resolve().parent, self.root)

    def add_image(self, image: Path, name: str) -> None:
        """Add an image file under `name`: as a hard link if the file system allows it, otherwise as a copy.

        A link takes no space and remains when the source is deleted or moved. An image that is already at its final
        place stays there. An image outside the source is copied, because a link would share a file of somebody else.
        Raises UserError if `name` is outside the folder, or if the image is outside the source and that is not allowed.
        """
        if self.source is not None and not self.source.contains(image):
            self.source.check(image)
            shutil.copyfile(image, self._new_file(name))
            self.image_counts["copied from outside the data folder"] += 1
            return
        if self.source is not None and self.source.is_unpacked(image):
            os.replace(image, self._new_file(name))
            self.image_counts["written"] += 1
            return
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
def output_folder(to: Path, known_names: Iterable[str], source: Source | None = None) -> Iterator[OutputFolder]:
    """Yield an OutputFolder that becomes `to` if the block succeeds and is deleted if it raises an exception.

    It is filled in a temporary folder beside `to`, then renamed. If `to` has files already, every new file replaces the
    old one of the same name by a rename, and other files stay. `source` is where its images come from. Raises UserError
    if `to` has files but none of `known_names` (so it belongs to something else), or if it cannot be written.
    """
    _require_own_folder(to, known_names)
    try:
        with explaining_full_disk(to), temporary_folder(to) as temporary:
            root = temporary / to.name
            root.mkdir()
            yield OutputFolder(root, to, source)
            flush(root)
            _publish(root, to)
            flush_entry(to.parent)
    except OSError as error:
        raise UserError(f"cannot write {to}: {error.strerror or error}") from None


@dataclass(frozen=True, slots=True)
class ImageHashes:
    """Hashes of an image."""

    file: str
    """Of the file's bytes."""
    pixels: str
    """Of the decoded pixels."""


def check_images(paths: Iterable[Path], source: Source | None = None) -> None:
    """Decode every image; raises UserError for the first that is missing, damaged, or outside `source`."""

    def check_image(path: Path) -> None:
        if source is not None:
            source.check(path)
        open_image(path)  # the image is not returned, so that not all of them are in memory at once

    with _thread_pool() as pool:
        for _ in pool.map(check_image, paths):
            pass


def hash_images(
    paths: Iterable[Path], source: Source | None = None, transparency: Transparency = "white"
) -> Iterator[tuple[Path, ImageHashes | UserError]]:
    """Decode every image and yield it with its hashes, or with the error if it is missing, damaged or outside `source`.

    The images are decoded in threads; large images one at a time, so that the memory is bounded.
    """

    def try_hash(path: Path) -> tuple[Path, ImageHashes | UserError]:
        """Return the error instead of raising it, so that the other images go on."""
        try:
            if source is not None:
                source.check(path)
            with large_file_lock(path):
                data = read_image(path)
                file_hash = hashlib.blake2b(data, digest_size=16).hexdigest()
                return path, ImageHashes(file_hash, hash_pixels(data, str(path), transparency))
        except UserError as error:
            return path, error

    with _thread_pool() as pool:
        yield from pool.map(try_hash, paths)


def _thread_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(8, os.cpu_count() or 1))


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
