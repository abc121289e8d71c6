"""Scenes to pictures: every icon is rendered once per size and color, smoothed, and then only pasted."""

import math
from functools import lru_cache

from PIL import Image, ImageDraw

from blipfit.data.icons.scene import BOARD, LAST_MARK, Icon, Scene

RGB = {
    "red": (222, 34, 34),
    "orange": (255, 146, 20),
    "yellow": (255, 225, 30),
    "green": (38, 160, 60),
    "blue": (40, 90, 230),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
}
PAPER = {
    "white": (255, 255, 255),
    "gray": (238, 238, 238),
    "cream": (250, 245, 230),
    "sky": (232, 242, 252),
}
INK = (70, 70, 70)
FINE = 8  # an icon is drawn this many times larger and scaled down: smooth edges
MARGIN = 1 / 16  # of its box, free on every side of an icon
# Of the picture's side: first mark of the number line and distance of the marks; at 64 they are whole pixels.
LEFT, STEP = 7.5 / 64, 5 / 64


def _outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape in the unit square, y downwards."""
    if shape == "square":
        return [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)]
    if shape == "triangle":
        return [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)]
    if shape == "diamond":
        return [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)]
    if shape == "cross":
        a, b = 0.33, 0.67
        return [
            (a, 0),
            (b, 0),
            (b, a),
            (1, a),
            (1, b),
            (b, b),
            (b, 1),
            (a, 1),
            (a, b),
            (0, b),
            (0, a),
            (a, a),
        ]
    if shape == "star":
        turns = [(math.pi * (step / 5 - 0.5), 0.53 if step % 2 == 0 else 0.22) for step in range(10)]
        return [(0.5 + radius * math.cos(turn), 0.53 + radius * math.sin(turn)) for turn, radius in turns]
    if shape == "heart":
        turns_ = [math.tau * step / 60 for step in range(60)]
        return [
            (
                0.5 + math.sin(turn) ** 3 * 0.5,
                0.46
                - (13 * math.cos(turn) - 5 * math.cos(2 * turn) - 2 * math.cos(3 * turn) - math.cos(4 * turn)) / 32,
            )
            for turn in turns_
        ]
    if shape == "moon":  # one circle less another; they meet where the angles below begin and end
        outer = [math.radians(56.6 + 246.8 * step / 50) for step in range(51)]
        inner = [math.radians(276.2 - 192.4 * step / 40) for step in range(41)]
        rim = [(0.6 + 0.5 * math.cos(turn), 0.5 + 0.5 * math.sin(turn)) for turn in outer]
        return rim + [(0.83 + 0.42 * math.cos(turn), 0.5 + 0.42 * math.sin(turn)) for turn in inner]
    return [(0.5 + 0.49 * math.cos(turn), 0.5 + 0.49 * math.sin(turn)) for turn in _around(64)]


def _around(steps: int) -> list[float]:
    return [math.tau * step / steps for step in range(steps)]


@lru_cache(maxsize=4096)
def _sprite(shape: str, color: str, side: int) -> tuple[Image.Image, Image.Image]:
    """Colour and mask of an icon in a box of `side` pixels."""
    large = side * FINE
    inset, inner = MARGIN * large, (1 - 2 * MARGIN) * large
    corners = [(inset + x * inner, inset + y * inner) for x, y in _outline(shape)]
    mask = Image.new("L", (large, large), 0)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    edge = tuple(int(channel * 0.72) for channel in RGB[color])
    paint = Image.new("RGB", (large, large), RGB[color])
    ImageDraw.Draw(paint).polygon(corners, outline=edge, width=max(1, large // 28))
    box = (side, side)
    return paint.resize(box, Image.Resampling.BOX), mask.resize(box, Image.Resampling.BOX)


def _hand(face: ImageDraw.ImageDraw, middle: tuple[float, float], turn: float, length: float, width: int, color):
    """A clock hand; `turn` in parts of a full turn from twelve."""
    x, y = middle
    tip = (x + length * math.sin(math.tau * turn), y - length * math.cos(math.tau * turn))
    face.line([middle, tip], fill=color, width=width)
    round_end = width / 2
    face.ellipse([tip[0] - round_end, tip[1] - round_end, tip[0] + round_end, tip[1] + round_end], fill=color)


@lru_cache(maxsize=1024)
def _clock(value: int, look: tuple, background: str, side: int) -> Image.Image:
    """A face with twelve marks, a short thick hour hand and a long minute hand."""
    rim, hands, right, down = look
    large = side * FINE // 2
    unit = large / 64
    picture = Image.new("RGB", (large, large), PAPER[background])
    face = ImageDraw.Draw(picture)
    x, y = (32 + right) * unit, (32 + down) * unit
    radius = 28 * unit
    face.ellipse(
        [x - radius, y - radius, x + radius, y + radius],
        fill="white",
        outline=RGB[rim],
        width=round(3 * unit),
    )
    for hour in range(12):
        turn = math.tau * hour / 12
        start, end = (19 if hour % 3 == 0 else 21.5) * unit, 24 * unit
        spoke = [(x + reach * math.sin(turn), y - reach * math.cos(turn)) for reach in (start, end)]
        face.line(spoke, fill=INK, width=round((2 if hour % 3 == 0 else 1) * unit))
    _hand(face, (x, y), value / 24, 11 * unit, round(4 * unit), RGB[hands])
    _hand(face, (x, y), value % 2 / 2, 18 * unit, round(2 * unit), INK)
    dot = 3 * unit
    face.ellipse([x - dot, y - dot, x + dot, y + dot], fill=INK)
    return picture.resize((side, side), Image.Resampling.BOX)


# Bars of a seven-segment digit: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = {"0": "1110111", "1": "0010010", "5": "1101011"}


def _digit(page: ImageDraw.ImageDraw, digit: str, left: float, top: float, unit: float) -> None:
    """One digit, 3 units wide and 5 high, in bars one unit thick."""
    bars = ((0, 0, 3, 1), (0, 0, 1, 3), (2, 0, 3, 3), (0, 2, 3, 3), (0, 2, 1, 5), (2, 2, 3, 5), (0, 4, 3, 5))
    for on, (x0, y0, x1, y1) in zip(SEGMENTS[digit], bars, strict=True):
        if on == "1":
            page.rectangle([left + x0 * unit, top + y0 * unit, left + x1 * unit - 1, top + y1 * unit - 1], fill=INK)


@lru_cache(maxsize=1024)
def _scale(value: int, look: tuple, background: str, side: int) -> Image.Image:
    """A line with eleven marks, 0, 5 and 10 long and numbered, and a triangle standing over one of them."""
    color, down = look
    large = side * FINE // 2
    unit = large / 64
    picture = Image.new("RGB", (large, large), PAPER[background])
    page = ImageDraw.Draw(picture)
    base = (34 + down) * unit
    xs = [(LEFT + STEP * mark) * large for mark in range(LAST_MARK + 1)]
    page.rectangle([xs[0], base - unit, xs[-1], base - 1], fill=INK)
    for mark, x in enumerate(xs):
        height = (5 if mark % 5 == 0 else 3) * unit
        page.rectangle([x - unit / 2, base - unit, x + unit / 2 - 1, base + height], fill=INK)
        if mark % 5 == 0:
            text, top = str(mark), base + 7 * unit
            left = x - (4 * len(text) - 1) * unit / 2
            for place, digit in enumerate(text):
                _digit(page, digit, left + 4 * place * unit, top, unit)
    tip = xs[value]
    page.polygon(
        [(tip, base - 2 * unit), (tip - 5 * unit, base - 12 * unit), (tip + 5 * unit, base - 12 * unit)],
        fill=RGB[color],
    )
    return picture.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=8)
def _question_mark(side: int) -> Image.Image:
    """The mask of the sign in the open place of a pattern."""
    large = side * FINE
    mask = Image.new("L", (large, large), 0)
    sign = ImageDraw.Draw(mask)
    width = large // 8
    sign.arc([large * 0.28, large * 0.1, large * 0.72, large * 0.54], 180, 90, fill=255, width=width)
    middle = large / 2
    sign.rectangle([middle - width / 2, large * 0.47, middle + width / 2, large * 0.68], fill=255)
    sign.ellipse([middle - width * 0.6, large * 0.75, middle + width * 0.6, large * 0.75 + width * 1.2], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _paste(picture: Image.Image, icon: Icon, size: int) -> None:
    left, top = round(icon.col * size / BOARD), round(icon.row * size / BOARD)
    paint, mask = _sprite(icon.shape, icon.color, round(icon.span * size / BOARD))
    picture.paste(paint, (left, top), mask)


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """The picture of a scene, RGB, `size` × `size`; with a size divisible by 4, cells are whole pixels."""
    if scene.kind == "clock":
        return _clock(scene.value, scene.look, scene.background, size).copy()
    if scene.kind == "scale":
        return _scale(scene.value, scene.look, scene.background, size).copy()
    picture = Image.new("RGB", (size, size), PAPER[scene.background])
    for icon in scene.icons:
        _paste(picture, icon, size)
    if scene.open_cell is not None:
        row, col = scene.open_cell
        place = (round(col * size / BOARD), round(row * size / BOARD))
        picture.paste(INK, place, _question_mark(round(size / BOARD)))
    return picture
