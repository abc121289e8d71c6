"""Files that are no images are recognized, and images are not taken for them."""

import io

import pytest
from PIL import Image

from blipfit.data import images, not_an_image
from blipfit.errors import UserError

FTYP = b"\x00\x00\x00\x18ftyp"


@pytest.mark.parametrize(
    ("data", "kind", "fix"),
    [
        (b"", "empty", "again"),
        (b" \n", "blank", "again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "Git LFS", "git lfs pull"),
        (b"/annex/objects/SHA256E-s1--00.png\n", "git-annex", "git annex get"),
        (FTYP + b"heic", "HEIC", "convert"),
        (FTYP + b"mif1", "HEIC", "convert"),
        (FTYP + b"isom", "video", "frame"),
        (b"\x1aE\xdf\xa3junk", "video", "frame"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript", "convert"),
        (b"%PDF-1.7\n", "PDF", "convert"),
        (b"8BPS\x00\x01", "Photoshop", "convert"),
        (b"\xff\x0a\x00", "JPEG XL", "convert"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "convert"),
        (b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- x -->\n<SVG/>", "SVG", "convert"),
        (b"<!DOCTYPE html><html><svg/></html>", "HTML", "image itself"),
        (b"\n\n<HTML lang=en>", "HTML", "image itself"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML", "image itself"),
        (b'{"error": "not found"}', "JSON", "image itself"),
        (b"PK\x03\x04junk", "zip", "unpack"),
        (b"\x00\x05\x16\x07\x00", "macOS", "delete"),
    ],
)
def test_the_kind_and_the_fix_are_in_the_message(data: bytes, kind: str, fix: str):
    with pytest.raises(UserError) as error:
        images.decode_image(data, "photo.jpg")
    assert str(error.value).startswith("photo.jpg ")
    assert kind in str(error.value)
    assert fix in str(error.value)
    assert "damaged" not in str(error.value)


@pytest.mark.parametrize("image_format", images.FORMATS)
def test_images_are_not_taken_for_anything_else(image_format: str):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, image_format)
    assert not_an_image.describe(buffer.getvalue()) is None
