"""Open image files safely, resize or augment them as in the published experiments, and normalize their pixels.

Shapes: `B` images, `S` pixels per side.
"""

import hashlib
import io
import math
import random
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from blipfit.data import not_an_image
from blipfit.data.question import Transparency as Transparency
from blipfit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

Result = TypeVar("Result")

SIZE = 224
# Mean and standard deviation per color channel, of CLIP's image processor.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""Formats that are opened, by Pillow's names. Pillow would try all it knows, and for PostScript start Ghostscript."""
MAX_PIXELS = 100_000_000
"""Most pixels of an image: decoding takes up to 20 bytes per pixel."""
MAX_FILE_BYTES = 2**30

# The random crop: range of its area (of the image), range of its aspect ratio, attempts before a centered crop.
CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
FLIP_PROBABILITY = 0.5

# How an image is turned upright, by its EXIF orientation.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")
# Images with more pixels or bytes are decoded one at a time, so that many threads do not fill the memory.
_LARGE_PIXELS = 4_000_000
_LARGE_FILE_BYTES = 16_000_000
_large_image_lock = threading.RLock()
# Python's warning filters are global, so only one thread at a time may change them while it reads a file's header.
_warnings_lock = threading.Lock()


def open_image(path: Path, transparency: Transparency = "white") -> Image.Image:
    """Return the image in RGB, fully decoded and rotated upright by its EXIF orientation.

    `transparency` says what becomes of transparent pixels. Raises UserError if the file is missing, not a regular file,
    larger than MAX_PIXELS or MAX_FILE_BYTES, damaged, or not an image of the formats in FORMATS.
    """
    with large_file_lock(path):
        return decode_image(read_image(path), str(path), transparency)


def large_file_lock(path: Path) -> AbstractContextManager[object]:
    """Return a lock to hold while a large image file is read and decoded; for other files, a context without effect."""
    try:
        is_large = path.stat().st_size > _LARGE_FILE_BYTES
    except (OSError, ValueError):
        is_large = False
    return _large_image_lock if is_large else nullcontext()


def read_image(path: Path) -> bytes:
    """Return the bytes of an image file without decoding them.

    Raises UserError if it is missing, unreadable, empty, larger than MAX_FILE_BYTES, or not a regular file: devices,
    FIFOs and the files of `/proc` are not opened.
    """
    try:
        size = _require_regular_file(path)
        with path.open("rb") as file:
            return file.read(size)
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: put the image there, or remove its question") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put an image there") from None
    except ValueError:  # a zero byte, or half a character
        raise UserError(f"{str(path)!r} cannot be a file name: give the path of an image") from None


def decode_image(data: bytes, name: str, transparency: Transparency = "white") -> Image.Image:
    """Decode the bytes of an image file as `open_image` does; `name` is used in the error message.

    Raises UserError as `open_image` does.
    """
    return _decode(data, name, transparency, lambda image: image)


def _decode(data: bytes, name: str, transparency: Transparency, use: Callable[[Image.Image], Result]) -> Result:
    """Return `use(image)` of a decoded image file; of large images, one is decoded and used at a time."""
    with _errors_as_user_errors(name, data):
        try:
            return _to_rgb(_open(data), name, transparency, use)
        except ValueError:
            # Pillow refuses long texts and color profiles in PNG files; they do not change the pixels.
            stripped = _strip_png_metadata(data)
            if stripped == data:
                raise
            return _to_rgb(_open(stripped), name, transparency, use)


def convert_image(image: Image.Image, name: str = "the image", transparency: Transparency = "white") -> Image.Image:
    """Return an image in memory with the pixels that `open_image` gives for its file; the image is not changed.

    Raises UserError as `open_image` does.
    """
    if image.format not in (None, "MPO", *FORMATS):
        raise UserError(f"{name} is of the format {image.format}; expected {_format_names()}: convert it to PNG")
    with _errors_as_user_errors(name):
        return _to_rgb(image, name, transparency, lambda rgb: rgb)


def hash_pixels(data: bytes, name: str, transparency: Transparency = "white") -> str:
    """Return a hash of the pixels that `decode_image` gives; equal for copies in other lossless formats.

    Raises UserError as `decode_image` does.
    """
    return _decode(data, name, transparency, _hash_rgb)


def _hash_rgb(image: Image.Image) -> str:
    digest = hashlib.blake2b(f"{image.width} {image.height}\n".encode(), digest_size=16)
    for top in range(0, image.height, 256):
        digest.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return digest.hexdigest()


def is_transparent(data: bytes) -> bool:
    """Return whether the bytes of an image file declare transparency, by their header; False if it is unreadable."""
    try:
        return _has_transparency(_open(data))
    except Exception:
        return False


def resize(image: Image.Image, size: int = SIZE) -> Image.Image:
    """Resize an image to `size × size`, bicubic, ignoring its aspect ratio (as in the published evaluation)."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def augment(image: Image.Image, *, seed: int, epoch: int, image_id: str, size: int = SIZE) -> Image.Image:
    """Crop and flip an image at random (as in the published training) and resize it to `size × size`, bicubic.

    Equal (seed, epoch, image_id) give equal pixels in every process and on every machine.
    """
    generator = _generator(seed, epoch, image_id)
    crop = image.crop(sample_crop_box(image.width, image.height, generator))
    is_flipped = generator.random() < FLIP_PROBABILITY
    square = resize(crop, size)
    return square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if is_flipped else square


def sample_crop_box(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Sample (left, top, right, bottom) of a crop in pixels, by the rule of torchvision's RandomResizedCrop.

    The area is uniform in CROP_AREA, the aspect ratio log-uniform in CROP_RATIO. A box that does not fit is sampled
    again; after CROP_ATTEMPTS the largest centered box with an allowed ratio is used.
    """
    for _ in range(CROP_ATTEMPTS):
        area = width * height * _uniform(generator, *CROP_AREA)
        ratio = math.exp(_uniform(generator, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    return _center_box(width, height)


def to_pixels(images: Sequence[Image.Image], size: int = SIZE) -> "torch.Tensor":
    """Return the pixels `B × 3 × S × S` of images, float32: resized, scaled to 0–1, normalized with MEAN and STD.

    `size` is S. The result equals that of transformers' `BlipImageProcessorPil` in every bit.
    """
    import numpy as np
    import torch

    table = _normalization_table()
    batch = np.empty((len(images), 3, size, size), dtype=np.float32)
    for row, image in zip(batch, images, strict=True):
        levels = np.asarray(resize(image, size))
        for channel in range(3):
            np.take(table[channel], levels[..., channel], out=row[channel], mode="clip")  # "raise" copies
    return torch.from_numpy(batch)


@lru_cache(maxsize=1)
def _normalization_table() -> "np.ndarray":
    """Return the 256 possible normalized values of each channel, `3 × 256`: a table lookup replaces arithmetic."""
    import numpy as np

    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    return (scaled[None, :] - mean[:, None]) / std[:, None]


def _generator(seed: int, epoch: int, image_id: str) -> random.Random:
    # Python's own hash() of a text differs from process to process.
    digest = hashlib.blake2b(f"{seed}\n{epoch}\n{image_id}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _uniform(generator: random.Random, low: float, high: float) -> float:
    # random() is the only method whose sequence Python guarantees never to change.
    return low + (high - low) * generator.random()


def _center_box(width: int, height: int) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = round(w / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(h * CROP_RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _require_regular_file(path: Path) -> int:
    """Return the size of a file in bytes; raises UserError if it is not a file that can be an image."""
    status = path.stat()
    kinds = {stat.S_IFDIR: "folder", stat.S_IFCHR: "device", stat.S_IFBLK: "device", stat.S_IFIFO: "FIFO"}
    if not stat.S_ISREG(status.st_mode):
        kind = kinds.get(stat.S_IFMT(status.st_mode), "socket or other special file")
        raise UserError(f"{path} is a {kind}, not an image file: give the path of an image")
    if status.st_size == 0:  # also every file of /proc
        raise UserError(f"{path} is empty (0 bytes): {not_an_image.AGAIN}")
    if status.st_size > MAX_FILE_BYTES:
        raise UserError(
            f"{path} has {status.st_size / 2**30:.1f} GiB, more than the limit of {MAX_FILE_BYTES / 2**30:.0f} GiB for "
            "an image: scale the image down"
        )
    return status.st_size


@contextmanager
def _errors_as_user_errors(name: str, data: bytes | None = None) -> Iterator[None]:
    """Turn every exception of a decoder into a UserError; Pillow's decoders raise exceptions of many kinds."""
    try:
        yield
    except UserError:
        raise
    except MemoryError:
        raise UserError(f"{name} takes more memory than is free: scale the image down") from None
    except Image.DecompressionBombError as error:
        pixels = re.search(r"(\d+) pixels", str(error))
        raise UserError(_too_large(name, f"{int(pixels[1]):,}" if pixels else "too many")) from None
    except Exception as error:
        if description := None if data is None else not_an_image.describe(data):
            raise UserError(f"{name} {description[0]}: {description[1]}") from None
        reason = f"expected {_format_names()}" if isinstance(error, UnidentifiedImageError) else _reason(error)
        raise UserError(f"{name} is damaged or not an image ({reason}): {not_an_image.AGAIN}") from None


def _reason(error: Exception) -> str:
    """Return the text of a decoder's exception on one line, without memory addresses."""
    reason = re.sub(r"<\S+ object at 0x[0-9a-f]+>", "the file", " ".join(str(error).split()))
    return reason[:200] or type(error).__name__


def _too_large(name: str, size: str) -> str:
    return f"{name} has {size} pixels; the limit is {MAX_PIXELS:,} pixels: scale the image down"


def _format_names() -> str:
    return f"{', '.join(FORMATS[:-1])} or {FORMATS[-1]}"


@lru_cache(maxsize=1)
def _available_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # AVIF needs a Pillow that was built with it


def _open(data: bytes) -> Image.Image:
    """Read the header of an image file."""
    with _warnings_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=_available_formats())


def _to_rgb(image: Image.Image, name: str, transparency: Transparency, use: Callable[[Image.Image], Result]) -> Result:
    """Decode an opened image, turn it upright and convert it to RGB; return `use` of it."""
    pixels = image.width * image.height
    if not pixels:
        raise UserError(f"{name} has no pixels ({image.width} x {image.height}): give another image")
    if pixels > MAX_PIXELS:
        raise UserError(_too_large(name, f"{image.width} x {image.height}"))
    with _large_image_lock if pixels > _LARGE_PIXELS else nullcontext():
        image.load()
        turn = _TURNS.get(_orientation(image))
        rgb = _convert(image, name, transparency)
        return use(rgb if turn is None else rgb.transpose(turn))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 if there is none or it cannot be read."""
    # Cameras do not write PNG files, and Pillow turns TIFF files itself.
    if image.format in ("PNG", "TIFF"):
        return 1
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _strip_png_metadata(data: bytes) -> bytes:
    """Return a PNG file without texts, color profile and EXIF data; other data are returned unchanged."""
    if not data.startswith(_PNG_SIGNATURE):
        return data
    chunks, start = [_PNG_SIGNATURE], len(_PNG_SIGNATURE)
    while start < len(data):
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")  # length, name, content, checksum
        if data[start + 4 : start + 8] not in _PNG_METADATA:
            chunks.append(data[start:end])
        start = end
    return b"".join(chunks)


def _has_transparency(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _convert(image: Image.Image, name: str, transparency: Transparency) -> Image.Image:
    """Convert a decoded image to RGB, 8 bits per channel."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return _scale_16_bit_gray(image, transparency)
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (mode {image.mode}): save it with 8 bits per channel")
    if image.mode == "La":
        image = image.convert("LA")
    if transparency == "white" and _has_transparency(image):
        colors = image.convert("RGBA")
        alpha = colors.getchannel("A")
        if alpha.getextrema() == (255, 255):
            return colors.convert("RGB")
        background = Image.new("RGB", image.size, "white")
        background.paste(colors, mask=alpha)
        return background
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colors as a direct conversion, but without Pillow's warning
    try:
        return image if image.mode == "RGB" else image.convert("RGB")
    except ValueError:
        raise UserError(f"{name} has pixels of the mode {image.mode}: save it as RGB") from None


def _scale_16_bit_gray(image: Image.Image, transparency: Transparency) -> Image.Image:
    # Pillow clips 16-bit gray values at 255, which gives a white image.
    import numpy as np

    values = np.asarray(image)
    levels = (values >> 8).astype(np.uint8)
    transparent = image.info.get("transparency")
    if transparency == "white" and isinstance(transparent, int):
        levels[values == transparent] = 255
    return Image.fromarray(levels).convert("RGB")
