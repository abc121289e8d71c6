"""Images: opening and errors, the distribution of the published crop, pixels equal to those of transformers."""

import io
import os
import random
import statistics
import struct
import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.data import images as image_files
from blipfit.data.images import (
    SIZE,
    augment,
    convert_image,
    decode_image,
    hash_pixels,
    is_transparent,
    open_image,
    read_image,
    resize,
    sample_crop_box,
    to_pixels,
)
from blipfit.data.not_an_image import explain_why_no_path
from blipfit.errors import UserError


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def png(image: Image.Image, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def same(actual: Image.Image, expected: Image.Image) -> bool:
    return actual.size == expected.size and np.array_equal(np.asarray(actual), np.asarray(expected))


def test_open_image_gives_rgb(tmp_path: Path):
    image = noise(30, 20)
    image.convert("L").save(tmp_path / "gray.png")
    opened = open_image(tmp_path / "gray.png")
    assert (opened.mode, opened.size) == ("RGB", (30, 20))
    assert same(opened, image.convert("L").convert("RGB"))


def test_transparency_is_dropped_without_a_warning():
    colors = noise(8, 8).convert("P", palette=Image.Palette.ADAPTIVE, colors=16)
    opened = decode_image(png(colors, transparency=bytes(range(16))), "x", "dropped")
    assert same(opened, colors.convert("RGB"))
    with_alpha = noise(8, 8)
    with_alpha.putalpha(7)
    assert same(decode_image(png(with_alpha), "x", "dropped"), noise(8, 8))


def transparent_images() -> dict[str, bytes]:
    """A black left half on a transparent ground, in every way that PNG, GIF and WebP have."""
    alpha = Image.new("L", (8, 8), 0)
    alpha.paste(255, (0, 0, 4, 8))
    rgba = Image.new("RGB", (8, 8))
    rgba.putalpha(alpha)
    gray = Image.merge("LA", (Image.new("L", (8, 8)), alpha))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 200, 0, 0])
    palette.paste(0, (0, 0, 4, 8))
    keyed = palette.convert("RGB")
    deep = Image.fromarray(np.where(np.asarray(alpha) > 0, 0, 4000).astype(np.uint16))
    webp, gif = io.BytesIO(), io.BytesIO()
    rgba.save(webp, "WEBP", lossless=True)
    palette.save(gif, "GIF", transparency=1)
    return {
        "RGBA": png(rgba),
        "LA": png(gray),
        "palette": png(palette, transparency=1),
        "palette with alpha": png(palette, transparency=bytes([255, 0])),
        "color key": png(keyed, transparency=(200, 0, 0)),
        "gray key": png(keyed.convert("L"), transparency=keyed.convert("L").getpixel((7, 0))),
        "16-bit gray key": png_with_chunk(png(deep), b"tRNS", struct.pack(">H", 4000)),
        "WebP": webp.getvalue(),
        "GIF": gif.getvalue(),
    }


def png_with_chunk(data: bytes, name: bytes, content: bytes) -> bytes:
    """Insert a chunk after the header of a PNG file."""
    chunk = struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
    return data[:33] + chunk + data[33:]


@pytest.mark.parametrize("kind", transparent_images())
def test_transparency_is_shown_on_white(kind: str):
    data = transparent_images()[kind]
    expected = Image.new("RGB", (8, 8), "white")
    expected.paste("black", (0, 0, 4, 8))
    assert is_transparent(data)
    assert same(decode_image(data, "x"), expected)
    assert same(convert_image(Image.open(io.BytesIO(data))), expected)


def test_half_transparent_pixels_are_mixed_with_white_and_opaque_ones_stay():
    image = Image.new("RGBA", (1, 1), (0, 100, 200, 128))
    assert decode_image(png(image), "x").getpixel((0, 0)) == (127, 177, 227)
    opaque = noise(8, 8)
    opaque.putalpha(255)
    assert same(decode_image(png(opaque), "x"), noise(8, 8))
    assert not is_transparent(png(noise(8, 8)))
    assert not is_transparent(b"no image")


def test_sixteen_bit_gray_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(decode_image(png(deep), "x"))[0, :, 0].tolist() == [0, 1, 255]


def test_photo_is_rotated_by_its_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "x").size == (20, 40)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_file_and_the_same_image_in_memory_are_turned_alike(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    for image_format in ("JPEG", "WEBP", "TIFF"):
        buffer = io.BytesIO()
        noise(24, 16).save(buffer, image_format, exif=exif)
        opened = decode_image(buffer.getvalue(), "x")
        assert opened.size == ((24, 16) if orientation < 5 else (16, 24))
        in_memory = Image.open(io.BytesIO(buffer.getvalue()))
        assert same(convert_image(in_memory), opened)
        assert same(convert_image(in_memory), opened)  # also when it is loaded already
    pil = Image.open(io.BytesIO(buffer.getvalue()))
    pil.load()


def test_exif_data_that_cannot_be_read_or_rewritten_stop_no_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    whole = exif.tobytes()
    for data in (whole[:-4], whole + b"\xff" * 9, b"Exif\x00\x00junk", whole.replace(b"\x03\x00", b"\x63\x00")):
        buffer = io.BytesIO()
        Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=data)
        assert decode_image(buffer.getvalue(), "x").size in ((40, 20), (20, 40))


def test_an_image_in_memory_is_not_changed():
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert convert_image(image).getpixel((0, 0)) == (255, 255, 255)
    assert (image.mode, image.getpixel((0, 0))) == ("RGBA", (0, 0, 0, 0))


def test_large_image_opens_without_a_warning_and_a_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert decode_image(png(noise(8, 8)), "x").size == (8, 8)
    with pytest.raises(UserError, match=r"x has 100 pixels; the limit is 100,000,000 pixels: scale the image down"):
        decode_image(png(noise(10, 10)), "x")


def test_an_image_above_the_pixel_limit_is_refused_before_it_is_decoded(monkeypatch):
    monkeypatch.setattr(image_files, "MAX_PIXELS", 99)
    data, image = png(noise(10, 10)), noise(10, 10)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"x has 10 x 10 pixels; the limit is 99 pixels"):
        decode_image(data, "x")
    with pytest.raises(UserError, match=r"the image has 10 x 10 pixels"):
        convert_image(image)


def test_large_images_are_decoded_one_at_a_time(monkeypatch):
    monkeypatch.setattr(image_files, "_LARGE_PIXELS", 50)
    running, most, lock, load = 0, 0, threading.Lock(), Image.Image.load

    def slow_load(image):
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        return load(image)

    convert = image_files._convert
    monkeypatch.setattr(image_files, "_convert", lambda image, *rest: (slow_load(image), convert(image, *rest))[1])
    data = png(noise(10, 10))
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(lambda _: hash_pixels(data, "x"), range(8)))) == 1
    assert most == 1


def test_equal_pixels_in_other_files_have_one_hash():
    buffer = io.BytesIO()
    noise(8, 600).save(buffer, "BMP")
    data = png(noise(8, 600))
    assert hash_pixels(buffer.getvalue(), "x") == hash_pixels(data, "x")
    assert hash_pixels(png(noise(600, 8)), "x") != hash_pixels(data, "x")
    assert hash_pixels(png(noise(8, 600, 1)), "x") != hash_pixels(data, "x")


def test_long_metadata_of_a_png_do_not_matter():
    data = png(noise(8, 8))
    long = zlib.compress(b"x" * 3_000_000)
    for name, start in ((b"zTXt", b"note\0\0"), (b"iTXt", b"note\0\1\0\0\0"), (b"iCCP", b"profile\0\0")):
        assert same(decode_image(png_with_chunk(data, name, start + long), "x"), noise(8, 8))


@pytest.mark.parametrize("image_format", ["DDS", "ICO", "EPS", "TGA", "PCX"])
def test_formats_that_are_not_listed_are_refused(image_format: str):
    buffer = io.BytesIO()
    noise(16, 16).save(buffer, image_format)
    with pytest.raises(UserError, match=r"^x is [^<>]*$"):
        decode_image(buffer.getvalue(), "x")
    in_memory = Image.open(io.BytesIO(buffer.getvalue()))
    with pytest.raises(UserError, match=rf"the image is of the format {image_format}; expected JPEG, PNG"):
        convert_image(in_memory)


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM"])
def test_every_listed_format_is_read_and_damage_is_one_sentence(image_format: str):
    buffer = io.BytesIO()
    image = noise(40, 30)
    image.save(buffer, image_format)
    data = buffer.getvalue()
    assert decode_image(data, "x").size == (40, 30)
    generator = random.Random(image_format)
    for _ in range(30):
        damaged = bytearray(data[: generator.randrange(len(data))] if generator.random() < 0.5 else data)
        for _ in range(generator.randrange(1, 20)):
            if damaged:
                damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        with suppress(UserError):
            decode_image(bytes(damaged), "x")


def test_sixteen_bit_gray_of_a_netpbm_file_is_scaled():
    assert decode_image(b"P5 2 1 65535\n\x80\x00\xff\xff", "x").getpixel((0, 0)) == (128, 128, 128)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_refused(mode: str):
    with pytest.raises(UserError, match="32-bit pixels"):
        convert_image(Image.new(mode, (4, 4)))


def test_devices_and_special_files_are_not_opened(tmp_path: Path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    (tmp_path / "empty.png").touch()
    monkeypatch.setattr(Path, "open", lambda self, *rest: pytest.fail(f"opened {self}"))
    for path, reason in (
        (tmp_path / "fifo.png", "is a FIFO"),
        (tmp_path / "link.png", "is a device"),
        (Path("/dev/null"), "is a device"),
        (Path("/proc/self/status"), "is empty"),
        (tmp_path / "empty.png", "is empty"),
        (tmp_path, "is a folder"),
    ):
        if path.exists():
            with pytest.raises(UserError, match=reason):
                read_image(path)


def test_a_file_above_the_size_limit_is_not_read(tmp_path: Path):
    with (tmp_path / "huge.png").open("wb") as file:
        file.truncate(image_files.MAX_FILE_BYTES + 1)
    with pytest.raises(UserError, match=r"huge\.png has 1\.0 GiB, more than the limit"):
        read_image(tmp_path / "huge.png")


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_what_cannot_be_a_file_name(name: str):
    with pytest.raises(UserError, match="cannot be a file name"):
        read_image(Path(name))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("data:image/png;base64,iVBORw0KGgo" + "A" * 5000, "a data address"),
        ("https://example.org/" + "a" * 5000, r"is an address \(https://example.org/a+…\)"),
        ("S3://bucket/a.png", "is an address"),
        ("file:///a.png", "is an address"),
        ("iVBORw0KGgo" * 500, "5500 characters long"),
        ("a\0b", "zero byte"),
        (" ", "is empty"),
    ],
)
def test_what_is_no_path(text: str, reason: str):
    import re

    explained = explain_why_no_path(text)
    assert explained is not None
    assert re.search(reason, explained)
    assert len(explained) < 300


@pytest.mark.parametrize("text", ["a.png", "/a/b c.jpg", "../data/1.png", "database/1.png", "http/1.png", "é.png"])
def test_paths_are_paths(text: str):
    assert explain_why_no_path(text) is None


def test_missing_image_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"17\.png is missing: put the image there"):
        open_image(tmp_path / "17.png")
    with pytest.raises(UserError, match="is a folder, not an image file"):
        open_image(tmp_path)
    with pytest.raises(UserError, match=r"cannot be read \(File name too long\)"):
        open_image(tmp_path / ("x" * 300))


@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 0.9, 0.98])
def test_truncated_png_is_an_error_wherever_it_ends(tmp_path: Path, fraction: float):
    data = png(noise(64, 64))
    (tmp_path / "cut.png").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"cut\.png is damaged or not an image .* download or copy the file again"):
        open_image(tmp_path / "cut.png")


def test_file_that_is_not_an_image_is_an_error(tmp_path: Path):
    (tmp_path / "x.png").write_text("<html>404</html>")
    with pytest.raises(UserError, match=r"x\.png is a web page \(HTML\), not an image: download"):
        open_image(tmp_path / "x.png")


def test_plain_resize_does_not_keep_the_aspect_ratio():
    image = noise(300, 100)
    assert same(resize(image), image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    assert resize(resize(image)).size == (SIZE, SIZE)


# In a wide image the largest box of an allowed ratio is the whole height at 4:3.
@pytest.mark.parametrize(("width", "height", "largest"), [(400, 400, 1), (640, 360, 0.75), (300, 380, 1)])
def test_crop_keeps_to_area_and_ratio(width: int, height: int, largest: float):
    generator = random.Random(1)
    boxes = [sample_crop_box(width, height, generator) for _ in range(2000)]
    areas = [(r - x) * (b - y) / (width * height) for x, y, r, b in boxes]
    ratios = [(r - x) / (b - y) for x, y, r, b in boxes]
    assert all(0 <= x < r <= width and 0 <= y < b <= height for x, y, r, b in boxes)
    # Sides are whole pixels, hence the margins.
    assert min(areas) == pytest.approx(0.5, abs=0.005)
    assert max(areas) == pytest.approx(largest, abs=0.02)
    assert min(ratios) > 0.745
    assert max(ratios) < 1.342


def test_crop_is_uniform_in_area_place_and_log_ratio():
    # Areas up to 3/4 fit at every ratio, so among them no box was rejected and the distribution is the sampled one.
    generator = random.Random(2)
    boxes = [sample_crop_box(1000, 1000, generator) for _ in range(6000)]
    small = [box for box in boxes if (box[2] - box[0]) * (box[3] - box[1]) <= 740_000]
    areas = [(r - x) * (b - y) / 1e6 for x, y, r, b in small]
    logs = [np.log((r - x) / (b - y)) for x, y, r, b in small]
    places = [x / (1000 - (r - x)) for x, y, r, b in small]
    assert statistics.mean(areas) == pytest.approx(0.62, abs=0.01)
    assert statistics.mean(logs) == pytest.approx(0, abs=0.02)
    assert statistics.pstdev(logs) == pytest.approx(2 * np.log(4 / 3) / np.sqrt(12), abs=0.01)
    assert statistics.mean(places) == pytest.approx(0.5, abs=0.02)


def test_image_too_narrow_for_any_crop_gives_the_center():
    assert sample_crop_box(1000, 10, random.Random(0)) == (493, 0, 506, 10)
    assert sample_crop_box(10, 1000, random.Random(0)) == (0, 493, 10, 506)


def test_equal_seeds_give_equal_pixels_and_others_do_not():
    image = noise(320, 240)
    first = augment(image, seed=42, epoch=3, image_id="17")
    assert first.size == (SIZE, SIZE)
    assert same(first, augment(image, seed=42, epoch=3, image_id="17"))
    for other in ({"seed": 43}, {"epoch": 4}, {"image_id": "18"}):
        assert not same(first, augment(image, **({"seed": 42, "epoch": 3, "image_id": "17"} | other)))


def test_augmentation_is_the_same_in_another_process():
    code = (
        "from PIL import Image; from blipfit.data.images import augment;"
        "ramp = Image.linear_gradient('L').convert('RGB');"
        "print(augment(ramp, seed=1, epoch=2, image_id='x', size=8).tobytes().hex())"
    )
    expected = augment(Image.linear_gradient("L").convert("RGB"), seed=1, epoch=2, image_id="x", size=8)
    for hash_seed in ("0", "1"):
        process = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert process.stdout.strip() == expected.tobytes().hex()


def test_half_of_the_augmented_images_are_flipped():
    left_to_right = Image.linear_gradient("L").rotate(90).convert("RGB")  # rises from left to right
    flips = 0
    for epoch in range(600):
        row = np.asarray(augment(left_to_right, seed=0, epoch=epoch, image_id="x", size=16))[8, :, 0].astype(int)
        flips += bool(row[0] > row[-1])
    assert 240 < flips < 360


def test_augmentation_is_the_one_of_earlier_versions():
    # A gray ramp shows the position of the crop. If these numbers change, old runs cannot be reproduced.
    ramp = Image.linear_gradient("L").convert("RGB")
    tops = [augment(ramp, seed=42, epoch=epoch, image_id="17", size=4).getpixel((0, 0))[0] for epoch in range(6)]
    assert tops == [46, 54, 38, 37, 34, 40]


def test_pixels_are_those_of_transformers_to_the_last_bit():
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    images = [noise(300, 200, 1), noise(50, 90, 2), noise(SIZE, SIZE, 3)]
    processor = BlipImageProcessorPil(size={"height": SIZE, "width": SIZE})
    expected = processor(images, return_tensors="pt")["pixel_values"]
    actual = to_pixels(images)
    assert actual.shape == (3, 3, SIZE, SIZE)
    assert actual.dtype == torch.float32
    assert torch.equal(actual, expected)


def test_pixels_of_no_images():
    assert to_pixels([], size=8).shape == (0, 3, 8, 8)
