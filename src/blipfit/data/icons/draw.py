"""Draw scenes as pictures with Pillow.

Every shape is rendered once per size and color at a higher resolution, scaled down for smooth edges, and then pasted.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from PIL import Image, ImageDraw

from blipfit.data.icons.scene import BOARD, LAST_MARK, Icon, Scene

ICON_RGB = {
    "red": (222, 34, 34),
    "orange": (255, 146, 20),
    "yellow": (255, 225, 30),
    "green": (38, 160, 60),
    "blue": (40, 90, 230),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
}
BACKGROUND_RGB = {
    "white": (255, 255, 255),
    "gray": (238, 238, 238),
    "cream": (250, 245, 230),
    "sky": (232, 242, 252),
}
INK_RGB = (70, 70, 70)  # lines, digits and the question mark
SUPERSAMPLING = 8  # an icon is rendered this many times larger and then scaled down
MARGIN = 1 / 16  # of the side of an icon's box; left empty on every side
# As fractions of the picture's side: the first mark of the number line and the distance between two marks.
# At 64 pixels both fall on pixel edges.
FIRST_MARK, MARK_DISTANCE = 7.5 / 64, 5 / 64

Point = tuple[float, float]  # x, y with y downwards
Color = tuple[int, int, int]  # red, green, blue, each 0 to 255

# Corners in the unit square. The cross has arms as wide as the middle third.
POLYGONS: dict[str, list[Point]] = {
    "square": [(0.06, 0.06), (0.94, 0.06), (0.94, 0.94), (0.06, 0.94)],
    "triangle": [(0.5, 0.02), (1.0, 0.95), (0.0, 0.95)],
    "diamond": [(0.5, 0.0), (0.86, 0.5), (0.5, 1.0), (0.14, 0.5)],
    "cross": [
        *((0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67)),
        *((0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33)),
    ],
}


def _compute_circle() -> list[Point]:
    angles = [math.tau * step / 64 for step in range(64)]
    return [(0.5 + 0.49 * math.cos(angle), 0.5 + 0.49 * math.sin(angle)) for angle in angles]


def _compute_star() -> list[Point]:
    """Five tips and five inner corners in turn, from the top."""
    polar = [(math.pi * (step / 5 - 0.5), 0.53 if step % 2 == 0 else 0.22) for step in range(10)]
    return [(0.5 + radius * math.cos(angle), 0.53 + radius * math.sin(angle)) for angle, radius in polar]


def _compute_heart() -> list[Point]:
    """The well-known heart curve with four cosines."""
    angles = [math.tau * step / 60 for step in range(60)]
    return [
        (
            0.5 + math.sin(angle) ** 3 * 0.5,
            0.46
            - (13 * math.cos(angle) - 5 * math.cos(2 * angle) - 2 * math.cos(3 * angle) - math.cos(4 * angle)) / 32,
        )
        for angle in angles
    ]


def _compute_moon() -> list[Point]:
    """A circle minus a second circle; the arcs start and end where the two circles intersect."""
    outer_angles = [math.radians(56.6 + 246.8 * step / 50) for step in range(51)]
    inner_angles = [math.radians(276.2 - 192.4 * step / 40) for step in range(41)]
    outer_arc = [(0.6 + 0.5 * math.cos(angle), 0.5 + 0.5 * math.sin(angle)) for angle in outer_angles]
    return outer_arc + [(0.83 + 0.42 * math.cos(angle), 0.5 + 0.42 * math.sin(angle)) for angle in inner_angles]


CURVES: dict[str, Callable[[], list[Point]]] = {
    "circle": _compute_circle,
    "star": _compute_star,
    "heart": _compute_heart,
    "moon": _compute_moon,
}


def _compute_outline(shape: str) -> list[Point]:
    """Return the corners of a shape's polygon in the unit square."""
    return POLYGONS[shape] if shape in POLYGONS else CURVES[shape]()


@lru_cache(maxsize=4096)
def _render_sprite(shape: str, color: str, side: int) -> tuple[Image.Image, Image.Image]:
    """Render an icon in a box of `side` pixels: its colors (RGB) and its mask (L)."""
    large = side * SUPERSAMPLING
    inset, inner = MARGIN * large, (1 - 2 * MARGIN) * large
    corners = [(inset + x * inner, inset + y * inner) for x, y in _compute_outline(shape)]
    mask = Image.new("L", (large, large), 0)
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    edge_rgb = tuple(int(channel * 0.72) for channel in ICON_RGB[color])
    colors = Image.new("RGB", (large, large), ICON_RGB[color])
    ImageDraw.Draw(colors).polygon(corners, outline=edge_rgb, width=max(1, large // 28))
    box = (side, side)
    return colors.resize(box, Image.Resampling.BOX), mask.resize(box, Image.Resampling.BOX)


def _draw_hand(
    canvas: ImageDraw.ImageDraw, center: Point, turn: float, length: float, width: int, color: Color
) -> None:
    """Draw a clock hand with a round tip; `turn` is its angle from twelve o'clock as a fraction of a full turn."""
    x, y = center
    tip = (x + length * math.sin(math.tau * turn), y - length * math.cos(math.tau * turn))
    canvas.line([center, tip], fill=color, width=width)
    radius = width / 2
    canvas.ellipse([tip[0] - radius, tip[1] - radius, tip[0] + radius, tip[1] + radius], fill=color)


@lru_cache(maxsize=1024)
def _draw_clock(value: int, appearance: tuple[Any, ...], background: str, side: int) -> Image.Image:
    """Draw a clock face with twelve marks, a short thick hour hand and a long minute hand."""
    rim_color, hand_color, right, down = appearance
    large = side * SUPERSAMPLING // 2
    unit = large / 64
    picture = Image.new("RGB", (large, large), BACKGROUND_RGB[background])
    canvas = ImageDraw.Draw(picture)
    x, y = (32 + right) * unit, (32 + down) * unit
    radius = 28 * unit
    canvas.ellipse(
        [x - radius, y - radius, x + radius, y + radius],
        fill="white",
        outline=ICON_RGB[rim_color],
        width=round(3 * unit),
    )
    for hour in range(12):
        angle = math.tau * hour / 12
        start, end = (19 if hour % 3 == 0 else 21.5) * unit, 24 * unit
        mark = [(x + distance * math.sin(angle), y - distance * math.cos(angle)) for distance in (start, end)]
        canvas.line(mark, fill=INK_RGB, width=round((2 if hour % 3 == 0 else 1) * unit))
    _draw_hand(canvas, (x, y), value / 24, 11 * unit, round(4 * unit), ICON_RGB[hand_color])
    _draw_hand(canvas, (x, y), value % 2 / 2, 18 * unit, round(2 * unit), INK_RGB)
    dot_radius = 3 * unit
    canvas.ellipse([x - dot_radius, y - dot_radius, x + dot_radius, y + dot_radius], fill=INK_RGB)
    return picture.resize((side, side), Image.Resampling.BOX)


# Bars of a seven-segment digit: top, upper left, upper right, middle, lower left, lower right, bottom.
SEGMENTS = {"0": "1110111", "1": "0010010", "5": "1101011"}


def _draw_digit(canvas: ImageDraw.ImageDraw, digit: str, left: float, top: float, unit: float) -> None:
    """Draw a digit 3 units wide and 5 units high with bars 1 unit thick; `unit` is in pixels."""
    bars = ((0, 0, 3, 1), (0, 0, 1, 3), (2, 0, 3, 3), (0, 2, 3, 3), (0, 2, 1, 5), (2, 2, 3, 5), (0, 4, 3, 5))
    for bit, (x0, y0, x1, y1) in zip(SEGMENTS[digit], bars, strict=True):
        if bit == "1":
            corners = [left + x0 * unit, top + y0 * unit, left + x1 * unit - 1, top + y1 * unit - 1]
            canvas.rectangle(corners, fill=INK_RGB)


@lru_cache(maxsize=1024)
def _draw_number_line(value: int, appearance: tuple[Any, ...], background: str, side: int) -> Image.Image:
    """Draw a line with eleven marks, three of them with a number, and a triangle that points down at mark `value`."""
    color, down = appearance
    large = side * SUPERSAMPLING // 2
    unit = large / 64
    picture = Image.new("RGB", (large, large), BACKGROUND_RGB[background])
    canvas = ImageDraw.Draw(picture)
    base = (34 + down) * unit
    xs = [(FIRST_MARK + MARK_DISTANCE * mark) * large for mark in range(LAST_MARK + 1)]
    canvas.rectangle([xs[0], base - unit, xs[-1], base - 1], fill=INK_RGB)
    for mark, x in enumerate(xs):
        height = (5 if mark % 5 == 0 else 3) * unit
        canvas.rectangle([x - unit / 2, base - unit, x + unit / 2 - 1, base + height], fill=INK_RGB)
        if mark % 5 == 0:
            text, top = str(mark), base + 7 * unit
            left = x - (4 * len(text) - 1) * unit / 2
            for position, digit in enumerate(text):
                _draw_digit(canvas, digit, left + 4 * position * unit, top, unit)
    tip = xs[value]
    canvas.polygon(
        [(tip, base - 2 * unit), (tip - 5 * unit, base - 12 * unit), (tip + 5 * unit, base - 12 * unit)],
        fill=ICON_RGB[color],
    )
    return picture.resize((side, side), Image.Resampling.BOX)


@lru_cache(maxsize=8)
def _render_question_mark(side: int) -> Image.Image:
    """Render the mask (L) of the question mark at the end of a pattern, in a box of `side` pixels."""
    large = side * SUPERSAMPLING
    mask = Image.new("L", (large, large), 0)
    canvas = ImageDraw.Draw(mask)
    width = large // 8
    canvas.arc([large * 0.28, large * 0.1, large * 0.72, large * 0.54], 180, 90, fill=255, width=width)
    middle = large / 2
    canvas.rectangle([middle - width / 2, large * 0.47, middle + width / 2, large * 0.68], fill=255)
    canvas.ellipse([middle - width * 0.6, large * 0.75, middle + width * 0.6, large * 0.75 + width * 1.2], fill=255)
    return mask.resize((side, side), Image.Resampling.BOX)


def _paste_icon(picture: Image.Image, icon: Icon, size: int) -> None:
    """Paste an icon into a picture of `size` × `size` pixels."""
    left, top = round(icon.col * size / BOARD), round(icon.row * size / BOARD)
    colors, mask = _render_sprite(icon.shape, icon.color, round(icon.span * size / BOARD))
    picture.paste(colors, (left, top), mask)


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Draw a scene as an RGB picture of `size` × `size` pixels.

    With a size divisible by 4, the edges of the board's cells fall on pixel edges.
    """
    if scene.value is not None:
        draw_instrument = _draw_clock if scene.kind == "clock" else _draw_number_line
        picture = draw_instrument(scene.value, scene.appearance, scene.background, size)
        return picture.copy()  # the original stays in the cache
    picture = Image.new("RGB", (size, size), BACKGROUND_RGB[scene.background])
    for icon in scene.icons:
        _paste_icon(picture, icon, size)
    if scene.question_mark_cell is not None:
        row, col = scene.question_mark_cell
        corner = (round(col * size / BOARD), round(row * size / BOARD))
        picture.paste(INK_RGB, corner, _render_question_mark(round(size / BOARD)))
    return picture
