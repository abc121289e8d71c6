"""Images of own data: paths, bytes, base64 texts and the dictionaries of `datasets.Image` become image files."""

import base64
import binascii
import hashlib
import os
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from blipfit.data import annotations, images, not_an_image
from blipfit.errors import UserError
from blipfit.file_writes import explaining_full_disk, temporary_folder

_SUFFIXES = (
    (b"\x89PNG", ".png"),
    (b"\xff\xd8\xff", ".jpg"),
    (b"GIF8", ".gif"),
    (b"BM", ".bmp"),
    (b"II*\0", ".tif"),
    (b"MM\0*", ".tif"),
    (b"\0\0\0\x0cjP", ".jp2"),
    (b"\xff\x4f\xff\x51", ".jp2"),
)
_MIN_BASE64 = 40  # characters; the smallest images have more, names of files are mostly shorter


class UnpackedImages:
    """A context that holds the images of a source that are not files: written to a temporary folder beside `to`.

    A file is named by the SHA-256 of its bytes. The folder appears with the first image and is deleted at the end.
    `cache`: folder of a download; its image files are written there too, because they are links to nameless files.
    """

    def __init__(self, to: Path, cache: Path | None = None):
        self._cache = cache
        self.folder: Path | None = None
        self._to = to
        self._exits = ExitStack()

    def __enter__(self) -> "UnpackedImages":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self._exits.close()

    def write(self, data: bytes) -> Path:
        """Return the file with these bytes. Raises UserError if it cannot be written."""
        name = hashlib.sha256(data).hexdigest()[:32] + _suffix(data)
        try:
            with explaining_full_disk(self._to):
                if self.folder is None:
                    self.folder = self._exits.enter_context(temporary_folder(self._to))
                file = self.folder / name
                if not file.exists():
                    file.write_bytes(data)
        except OSError as error:
            raise UserError(f"cannot write {self._to}: {error.strerror or error}") from None
        return file

    def resolve(self, value: Any, location: str, base: Path, base_name: str) -> Path:
        """Return the file of the image `value` of an entry; bytes and base64 texts are written first.

        `value`: a path relative to `base`, a base64 text with or without `data:…;base64,`, the bytes of a file, a
        dictionary with `bytes` and `path`, or a list of one of these. `base_name` says in a message what `base` is.
        Raises UserError if it is something else, a missing file, or a web address.
        """
        if isinstance(value, list):
            if len(value) != 1:
                raise UserError(f"{location}: 'image' holds {len(value)} images, but a question has exactly one")
            value = value[0]
        if isinstance(value, dict) and ("bytes" in value or "path" in value):
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes):
            return self.write(value)
        if isinstance(value, str):
            if (data := _decode_base64(value, location, base)) is not None:
                return self.write(data)
            file = require_image_file(value, location, base, base_name)
            return file if self._cache is None else self._copy(file, self._cache, location)
        kind = "missing" if value is None else f"of the type {type(value).__name__}"
        raise UserError(f"{location}: 'image' is {kind}; expected a path, bytes or base64 text")

    def _copy(self, file: Path, cache: Path, location: str) -> Path:
        """Copy a file of a download; a path out of its folder could name any file of this machine."""
        if not Path(os.path.normpath(file.absolute())).is_relative_to(cache.absolute()):
            raise UserError(f"{location}: image {file} is outside the downloaded folder {cache}: remove the entry")
        return self.write(images.read_image(file))


def require_image_file(text: str, location: str, base: Path, base_name: str) -> Path:
    """Return `base / text`, the path of an image file. Raises UserError if `text` is no path or no file is there.

    `location` and `base_name` say in a message which entry it is and what `base` is.
    """
    if reason := not_an_image.explain_why_no_path(text):
        raise UserError(f"{location}: 'image' {reason}")
    image = base / text
    if not annotations.exists(image):
        hint = "; write / instead of \\ in paths" if "\\" in text else ""
        raise UserError(f"{location}: image {image} is missing; paths are relative to {base_name}{hint}")
    return image


def _decode_base64(text: str, location: str, base: Path) -> bytes | None:
    """Return the bytes of a base64 text; None if the text is something else. Raises UserError for a damaged one."""
    if text[:5].lower() == "data:":
        header, comma, content = text.partition(",")
        if comma and header.lower().endswith(";base64"):
            try:
                return base64.b64decode("".join(content.split()), validate=True)
            except (binascii.Error, ValueError):
                raise UserError(
                    f"{location}: 'image' is a data address with damaged base64 text; write the image to a file and "
                    "give its path"
                ) from None
        return None
    if len(text) < _MIN_BASE64 or (len(text) <= 1000 and annotations.exists(base / text)):
        return None
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if _suffix(data) else None


def _suffix(data: bytes) -> str:
    """Return the usual suffix of an image by its first bytes; empty if they are not recognized."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ".webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return ".avif"
    if data[:1] == b"P" and data[1:2] in b"123456" and data[2:3].isspace():
        return ".ppm"
    return next((suffix for start, suffix in _SUFFIXES if data.startswith(start)), "")
