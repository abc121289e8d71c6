"""Images in a terminal and on a contact sheet."""

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from rich.style import Style
from rich.text import Text

_UPPER_HALF = "▀"


def in_terminal(images: Sequence[Image.Image], side: int = 32, gap: int = 4) -> Text:
    """Images side by side, two pixels per character: the upper one as its color, the lower one as its background."""
    small_images = [image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS) for image in images]
    text = Text()
    for row in range(0, side, 2):
        for number, image in enumerate(small_images):
            text.append(" " * (gap if number else 0))
            for column in range(side):
                upper, lower = _hex(image, column, row), _hex(image, column, row + 1)
                text.append(_UPPER_HALF, Style(color=upper, bgcolor=lower))
        text.append("\n")
    return text


def shrink(image: Image.Image, side: int = 224) -> Image.Image:
    """Return an image as `contact_sheet` shows it: a square of `side` pixels."""
    return image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[Image.Image], captions: Sequence[str], columns: int = 3, side: int = 224
) -> Image.Image:
    """Images in a grid with wrapped captions below them."""
    font, line, width = ImageFont.load_default(13), 17, side + 24
    wrapped = [_wrap(caption, font, side) for caption in captions]
    below = line * max((len(lines) for lines in wrapped), default=0) + 20
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * width + 24, rows * (side + below) + 24), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = 24 + number % columns * width, 24 + number // columns * (side + below)
        sheet.paste(image if image.size == (side, side) else shrink(image, side), (left, top))
        pen.rectangle((left - 1, top - 1, left + side, top + side), outline="#bbbbbb")
        for index, text in enumerate(lines):
            pen.text((left, top + side + 6 + index * line), text, fill="black", font=font)
    return sheet


def _hex(image: Image.Image, x: int, y: int) -> str:
    red, green, blue = image.getpixel((x, y))  # type: ignore[misc]
    return f"#{red:02x}{green:02x}{blue:02x}"


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for word in paragraph.split():
            if line and font.getlength(f"{line} {word}") > width:
                lines.append(line)
                line = word
            else:
                line = f"{line} {word}".strip()
        lines.append(line)
    return lines
