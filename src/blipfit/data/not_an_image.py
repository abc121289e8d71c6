"""Recognize what is not an image file, by its first bytes or by its path, so that a message can say how to fix it."""

import re

AGAIN = "download or copy the file again"
CONVERT = "convert it to JPEG or PNG"

_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "is a Git LFS pointer, not the image itself", "run `git lfs pull` in its repository"),
    (b"\x00\x05\x16\x07", "holds only macOS metadata (a `._` file)", "delete it"),
    (b"%!PS", "is a PostScript file", CONVERT),
    (b"\xc5\xd0\xd3\xc6", "is a PostScript file (EPS)", CONVERT),
    (b"%PDF", "is a PDF document", CONVERT),
    (b"8BPS", "is a Photoshop file", CONVERT),
    (b"DDS ", "is a DDS texture", CONVERT),
    (b"\x00\x00\x01\x00", "is an icon file (ICO)", CONVERT),
    (b"icns", "is an icon file (ICNS)", CONVERT),
    (b"qoif", "is a QOI image", CONVERT),
    (b"\xff\x0a", "is a JPEG XL image", CONVERT),
    (b"\x00\x00\x00\x0cJXL ", "is a JPEG XL image", CONVERT),
    (b"v/1\x01", "is an OpenEXR image", CONVERT),
    (b"#?RADIANCE", "is a Radiance HDR image", CONVERT),
    (b"\xd7\xcd\xc6\x9a", "is a Windows metafile (WMF)", CONVERT),
    (b"SIMPLE  =", "is a FITS file", CONVERT),
    (b"\x89HDF", "is an HDF5 file", CONVERT),
    (b"\x1aE\xdf\xa3", "is a video (Matroska or WebM)", "give an image, for example a frame of it"),
    (b"PK\x03\x04", "is a zip archive", "unpack it"),
    (b"\x1f\x8b", "is compressed with gzip", "unpack it"),
    (b"Rar!", "is a RAR archive", "unpack it"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive", "unpack it"),
    (b"/annex/objects/", "is a git-annex pointer, not the image itself", "run `git annex get` in its repository"),
)
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_HTML = re.compile(rb"<(!doctype html|html|head|body)\b", re.IGNORECASE)


def describe(data: bytes) -> tuple[str, str] | None:
    """Return what the content of a file is (`is a …`) and how to fix it, or None if it is not recognized.

    Only contents that are not accepted as images are recognized, from at most the first 4096 bytes.
    """
    start = data[:4096]
    if not start:
        return "is empty (0 bytes)", AGAIN
    for signature, kind, fix in _SIGNATURES:
        if start.startswith(signature):
            return kind, fix
    if start[4:8] == b"ftyp":
        if start[8:12] in _HEIF_BRANDS:
            return "is an HEIC (HEIF) photograph, which is not supported", CONVERT
        return None if start[8:12] in (b"avif", b"avis") else ("is a video (MP4)", "give an image, for example a frame")
    return _describe_text(start)


def explain_why_no_path(text: str) -> str | None:
    """Return why `text` is no path of an image file, with the fix, or None if it can be one."""
    if scheme := re.match(r"(data|https?|ftp|file|s3|gs|hf):", text, re.IGNORECASE):
        if scheme[1].lower() == "data":
            return "holds an image (a data address) instead of a path: write it to a file and give its path"
        address = text if len(text) <= 80 else f"{text[:79]}…"
        return f"is an address ({address}): download the image and give its path"
    if "\0" in text:
        return "has a zero byte, which no path can have"
    if len(text) > 1000:
        return (
            f"is {len(text)} characters long, which no path is: if it is an image as base64 text, write it to a file "
            "and give its path"
        )
    return None if text.strip() else "is empty: give the path of an image"


def _describe_text(start: bytes) -> tuple[str, str] | None:
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"\x00" in text:
        return None
    if text.startswith(b"<") and b"<svg" in text.lower() and not _HTML.match(text):
        return "is an SVG drawing, which has no pixels", CONVERT
    if _HTML.search(text):
        return "is a web page (HTML), not an image", "download the image itself again"
    if text.startswith((b"<?xml", b"<Error")):
        return "is an XML file, for example a server's error message", "download the image itself again"
    if text.startswith((b"{", b"[")):
        return "is a JSON text, for example a server's error message", "download the image itself again"
    if not text:
        return "holds only blank space", AGAIN
    return None
