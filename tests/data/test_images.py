"""Images: opening and errors, the distribution of the published crop, pixels equal to those of transformers."""

import io
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from blipfit.data.images import SIZE, augment, decode_image, open_image, resize, sample_crop_box, to_pixels
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
    opened = decode_image(png(colors, transparency=bytes(range(16))), "x")
    assert same(opened, colors.convert("RGB"))
    with_alpha = noise(8, 8)
    with_alpha.putalpha(7)
    assert same(decode_image(png(with_alpha), "x"), noise(8, 8))


def test_sixteen_bit_gray_is_scaled_not_clipped():
    deep = Image.fromarray(np.array([[0, 256, 65535]], dtype=np.uint16))
    assert np.asarray(decode_image(png(deep), "x"))[0, :, 0].tolist() == [0, 1, 255]


def test_photo_is_rotated_by_its_exif_orientation():
    exif = Image.Exif()
    exif[0x0112] = 6
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    assert decode_image(buffer.getvalue(), "x").size == (20, 40)


def test_large_image_opens_without_a_warning_and_a_decompression_bomb_is_an_error(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 40)
    assert decode_image(png(noise(8, 8)), "x").size == (8, 8)
    with pytest.raises(UserError, match=r"x is damaged or not an image .*exceeds limit"):
        decode_image(png(noise(10, 10)), "x")


def test_missing_image_is_an_error(tmp_path: Path):
    with pytest.raises(UserError, match=r"17\.png is missing: put the image there"):
        open_image(tmp_path / "17.png")
    with pytest.raises(UserError, match="cannot be read"):
        open_image(tmp_path)


@pytest.mark.parametrize("fraction", [0.0, 0.01, 0.1, 0.5, 0.9, 0.98])
def test_truncated_png_is_an_error_wherever_it_ends(tmp_path: Path, fraction: float):
    data = png(noise(64, 64))
    (tmp_path / "cut.png").write_bytes(data[: int(len(data) * fraction)])
    with pytest.raises(UserError, match=r"cut\.png is damaged or not an image .* download or copy the file again"):
        open_image(tmp_path / "cut.png")


def test_file_that_is_not_an_image_is_an_error(tmp_path: Path):
    (tmp_path / "x.png").write_text("<html>404</html>")
    with pytest.raises(UserError, match="damaged or not an image"):
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
