"""Open image files safely, resize or augment them as in the published experiments, and normalize their pixels.

Shapes: `B` images, `S` pixels per side.
"""

import hashlib
import io
import math
import random
import struct
import threading
import warnings
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageOps

from blipfit.errors import UserError

if TYPE_CHECKING:
    import numpy as np
    import torch

SIZE = 224
# Mean and standard deviation per color channel, of CLIP's image processor.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

# The random crop: range of its area (of the image), range of its aspect ratio, attempts before a centered crop.
CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10
FLIP_PROBABILITY = 0.5

# What Pillow's decoders raise on damaged files; the exceptions have no common base class.
_DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Python's warning filters are global, so only one thread at a time may change them while it opens a file.
_warnings_lock = threading.Lock()


def open_image(path: Path) -> Image.Image:
    """Return the image in RGB, fully decoded and rotated upright by its EXIF orientation.

    Transparency is dropped, as in the published experiments. Raises UserError if the file is missing, truncated or not
    an image.
    """
    return decode_image(read_image(path), str(path))


def read_image(path: Path) -> bytes:
    """Return the bytes of an image file without decoding them; raises UserError if it is missing or unreadable."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: put the image there, or remove its question") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put an image there") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode the bytes of an image file as `open_image` does; `name` is used in the error message.

    Raises UserError if they are truncated or not an image.
    """
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            # Reading EXIF data decodes a whole PNG, and cameras do not write PNG files.
            is_rotated = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image.load()
        return _rgb(ImageOps.exif_transpose(image) if is_rotated else image, name)
    except _DECODING_ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or not an image ({reason}): download or copy the file again") from None


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


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow clips 16-bit gray values at 255, which gives a white image.
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (mode {image.mode}): save it with 8 bits per channel")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colors as a direct conversion, but without Pillow's warning
    return image.convert("RGB")
