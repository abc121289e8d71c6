"""Hostile image files: every one is decoded to RGB within bounds, or refused with a UserError."""

import io
import warnings
import zlib
from functools import partial

import pytest
from hypothesis import strategies as st
from PIL import Image, features

from blipfit.data import images
from hostile_inputs import changed_bytes, is_user_error

MODES = {
    "PNG": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16"),
    "JPEG": ("RGB", "L", "CMYK"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("P", "L"),
    "BMP": ("RGB", "P", "L", "1"),
    "TIFF": ("RGB", "RGBA", "P", "L", "LA", "1", "I;16", "I", "F", "CMYK", "LAB"),
    "JPEG2000": ("RGB", "RGBA", "L"),
    "PPM": ("RGB", "L", "1"),
    "AVIF": ("RGB", "RGBA"),
}
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "jpeg")


def encode(format_name: str, mode: str, **options: object) -> bytes:
    """The bytes of a small image with all kinds of pixel values."""
    gradient = Image.linear_gradient("L").resize((13, 7))
    image = Image.merge("RGB", (gradient, gradient.rotate(90), gradient.rotate(180)))
    image = gradient.convert(mode) if mode in ("I", "F", "I;16") else image.convert("RGB").convert(mode)
    file = io.BytesIO()
    image.save(file, format_name, **options)
    return file.getvalue()


def valid_files() -> list[bytes]:
    """One small file of every format and mode, some with metadata, several frames or compressions."""
    files = [
        encode(name, mode)
        for name, modes in MODES.items()
        for mode in modes
        if name != "AVIF" or features.check("avif")
    ]
    files += [encode("TIFF", "RGB", compression=name) for name in TIFF_COMPRESSIONS]
    exif = Image.Exif()
    exif[0x0112] = 6
    files += [encode(name, "RGB", exif=exif) for name in ("JPEG", "PNG", "WEBP", "TIFF")]
    files.append(encode("PNG", "P", transparency=b"\0\x80"))
    files.append(encode("GIF", "P", save_all=True, append_images=[Image.new("P", (9, 9))], transparency=0))
    return files


VALID = valid_files()


def check(content: bytes) -> None:
    """Decode a file in both ways; nothing is printed, warned about or raised but UserError."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for transparency in ("white", "dropped"):
            if not is_user_error(partial(images.decode_image, content, "x", transparency)):
                image = images.decode_image(content, "x", transparency)
                assert image.mode == "RGB"
                assert 0 < image.width * image.height <= images.MAX_PIXELS
        images.is_transparent(content)
        is_user_error(lambda: images.hash_pixels(content, "x"))


def test_valid_files_are_decoded():
    refused = [
        Image.open(io.BytesIO(file)).mode for file in VALID if is_user_error(partial(images.decode_image, file, "x"))
    ]
    assert refused == ["I", "F"]


@pytest.mark.parametrize("number", range(len(VALID)))
def test_a_damaged_file_is_decoded_or_refused(for_all, number):
    for_all(6, check, changed_bytes(VALID[number]))


def test_a_damaged_header_is_decoded_or_refused(for_all):
    for_all(80, check, st.sampled_from(VALID).flatmap(lambda file: changed_bytes(file, 2, 64)))


def test_any_bytes_are_refused(for_all):
    signatures = st.sampled_from([file[:length] for file in VALID for length in (4, 8, 12, 16)])
    for_all(60, check, st.binary(max_size=80) | st.builds(bytes.__add__, signatures, st.binary(max_size=80)))


@st.composite
def png_files(draw: st.DrawFn) -> bytes:
    """A PNG file of chunks with right checksums, so that the decoder reads what is in them."""
    header = b"".join(draw(st.sampled_from([0, 1, 9, 2**16, 2**31 - 1, 2**32 - 1])).to_bytes(4, "big") for _ in "wh")
    header += bytes(draw(st.sampled_from(range(5)) | st.sampled_from([8, 16, 255])) for _ in range(5))
    pixels = zlib.compress(draw(st.binary(max_size=200)) * draw(st.integers(1, 50)))
    names = st.sampled_from(
        [b"PLTE", b"tRNS", b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"acTL", b"fcTL", b"fdAT", b"gAMA"]
    )
    chunks = [(b"IHDR", header)]
    chunks += draw(st.lists(st.tuples(names, st.binary(max_size=60)), max_size=4))
    chunks += [(b"IDAT", pixels), (b"IEND", b"")]
    parts = [b"\x89PNG\r\n\x1a\n"]
    for name, content in chunks:
        parts += [len(content).to_bytes(4, "big"), name, content, zlib.crc32(name + content).to_bytes(4, "big")]
    return b"".join(parts)


def test_a_png_file_of_any_chunks_is_decoded_or_refused(for_all):
    for_all(60, check, png_files())


def test_a_damaged_file_on_disk(for_all, tmp_path):
    """`open_image` and its message, which names the file."""
    file = tmp_path / "image.png"

    def check_file(content: bytes) -> None:
        file.write_bytes(content)
        try:
            images.open_image(file)
        except images.UserError as error:
            message = str(error)
            assert str(file) in message
            assert len(message) < 600
            assert message.isprintable()

    for_all(60, check_file, st.sampled_from(VALID).flatmap(lambda content: changed_bytes(content, 2)))
