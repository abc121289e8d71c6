"""Images: opened safely, resized or augmented as published, turned into normalized pixels.

Shapes: B images, S pixels a side.
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
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)

CROP_AREA = (0.5, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
CROP_TRIES = 10
FLIP_PROBABILITY = 0.5

# What Pillow's decoders raise on damaged files; there is no common class.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
# Filters of warnings are global, so only one thread at a time may open a file with them changed.
_opening = threading.Lock()


def open_image(path: Path) -> Image.Image:
    """Return the image in RGB, fully decoded, turned upright where a camera noted how it was held.

    Transparency is dropped, as in the published experiments. A missing, cut-off or foreign file: UserError.
    """
    return decode_image(read_image(path), str(path))


def read_image(path: Path) -> bytes:
    """Return the bytes of an image's file, not looked into; a missing or unreadable one: UserError."""
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path} is missing: put the image there, or take its question out") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): put an image there") from None


def decode_image(data: bytes, name: str) -> Image.Image:
    """Return the image that a file's bytes hold, as `open_image` does; `name` is for the error."""
    try:
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            # A PNG would be decoded just for this question, and cameras write none.
            turned = image.format != "PNG" and image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        image.load()
        return _rgb(ImageOps.exif_transpose(image) if turned else image, name)
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or no image ({reason}): fetch the file again") from None


def plain(image: Image.Image, size: int = SIZE) -> Image.Image:
    """Resize to a square, bicubic; the aspect ratio is not kept (the published evaluation)."""
    if image.size == (size, size):
        return image
    return image.resize((size, size), Image.Resampling.BICUBIC)


def augment(image: Image.Image, *, seed: int, epoch: int, image_id: str, size: int = SIZE) -> Image.Image:
    """Random resized crop and horizontal flip (the published training), resized to a square, bicubic.

    The same (seed, epoch, image_id) gives the same pixels in every process and on every machine.
    """
    generator = _generator(seed, epoch, image_id)
    cropped = image.crop(crop_box(image.width, image.height, generator))
    flipped = generator.random() < FLIP_PROBABILITY
    resized = plain(cropped, size)
    return resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else resized


def crop_box(width: int, height: int, generator: random.Random) -> tuple[int, int, int, int]:
    """Draw left, top, right, bottom by the rule of torchvision's RandomResizedCrop.

    The area is uniform in CROP_AREA, the ratio of the sides log-uniform in CROP_RATIO; a box that does not
    fit is drawn again, and after CROP_TRIES the largest centred box with an allowed ratio is taken.
    """
    for _ in range(CROP_TRIES):
        area = width * height * _uniform(generator, *CROP_AREA)
        ratio = math.exp(_uniform(generator, math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            top = int(generator.random() * (height - h + 1))
            left = int(generator.random() * (width - w + 1))
            return left, top, left + w, top + h
    return _centre_box(width, height)


def pixels(images: Sequence[Image.Image], size: int = SIZE) -> "torch.Tensor":
    """Return [B, 3, S, S] float32: resized where needed, scaled to 0–1, normalized with MEAN and STD.

    The numbers are those of transformers' `BlipImageProcessorPil`, to the last bit.
    """
    import numpy as np
    import torch

    table = _normalized()
    batch = np.empty((len(images), 3, size, size), dtype=np.float32)
    for row, image in zip(batch, images, strict=True):
        levels = np.asarray(plain(image, size))
        for channel in range(3):
            np.take(table[channel], levels[..., channel], out=row[channel], mode="clip")  # "raise" copies
    return torch.from_numpy(batch)


@lru_cache(maxsize=1)
def _normalized() -> "np.ndarray":
    """The 256 values a channel can have after normalization, [3, 256]: a look-up instead of arithmetic."""
    import numpy as np

    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    mean, std = np.array(MEAN, dtype=np.float32), np.array(STD, dtype=np.float32)
    return (scaled[None, :] - mean[:, None]) / std[:, None]


def _generator(seed: int, epoch: int, image_id: str) -> random.Random:
    # Python's own hash() of a text differs from process to process.
    digest = hashlib.blake2b(f"{seed}\n{epoch}\n{image_id}".encode(), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


def _uniform(generator: random.Random, low: float, high: float) -> float:
    # random() is the one draw whose sequence Python promises never to change.
    return low + (high - low) * generator.random()


def _centre_box(width: int, height: int) -> tuple[int, int, int, int]:
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = round(w / CROP_RATIO[0])
    elif width / height > CROP_RATIO[1]:
        w = round(h * CROP_RATIO[1])
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I;16"):
        # Pillow would cut 16-bit gray off at 255 and leave a white image.
        import numpy as np

        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UserError(f"{name} has 32-bit pixels (mode {image.mode}): save it with 8 bits a channel")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # same colors, without Pillow's warning about the direct way
    return image.convert("RGB")
