"""Reads a picture back: what stands where, told from the pixels alone.

Knows neither the generator nor its sprites: the background is the most frequent color, what differs from it
falls into connected pieces, the color of a piece is the nearest of seven names and its shape follows from how
its mass lies in its bounding box.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

NAMED = {
    "red": (220, 30, 30),
    "orange": (255, 145, 20),
    "yellow": (250, 220, 30),
    "green": (40, 160, 60),
    "blue": (40, 90, 230),
    "purple": (150, 50, 190),
    "black": (30, 30, 30),
    "sign": (70, 70, 70),  # the question mark of a pattern
}


@dataclass(frozen=True)
class Found:
    """One piece: its names and its bounding box in pixels (right and bottom are outside)."""

    shape: str
    color: str
    left: int
    top: int
    right: int
    bottom: int

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


def read(image: Image.Image) -> list[Found]:
    """All icons of a picture, row by row."""
    return _read(image.tobytes(), image.width)


@lru_cache(maxsize=8)
def _read(data: bytes, side: int) -> list[Found]:
    pixels = np.frombuffer(data, dtype=np.uint8).reshape(side, side, 3).astype(int)
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    differs = np.abs(pixels - colors[counts.argmax()]).max(axis=-1)
    found = [_piece(pixels, piece) for piece in _pieces(differs > 100)]
    return sorted((icon for icon in found if icon.color != "sign"), key=lambda icon: (icon.top // 8, icon.left))


def _pieces(inside: np.ndarray) -> list[list[tuple[int, int]]]:
    """The pixels of the connected pieces."""
    left = set(zip(*map(np.ndarray.tolist, np.nonzero(inside)), strict=True))
    pieces = []
    while left:
        piece, edge = [], [left.pop()]
        while edge:
            row, col = edge.pop()
            piece.append((row, col))
            near = {(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)} & left
            left -= near
            edge += near
        pieces.append(piece)
    return pieces


def _piece(pixels: np.ndarray, piece: list[tuple[int, int]]) -> Found:
    rows, cols = np.array(piece).T
    top, left = rows.min(), cols.min()
    box = np.zeros((rows.max() + 1 - top, cols.max() + 1 - left), dtype=bool)
    box[rows - top, cols - left] = True
    distances = np.abs(pixels[rows, cols][:, None] - np.array(list(NAMED.values()))).sum(axis=-1)
    color = list(NAMED)[np.bincount(distances.argmin(axis=1)).argmax()]
    return Found(_shape(box), color, left, top, left + box.shape[1], top + box.shape[0])


def _shape(box: np.ndarray) -> str:
    """The shape of a piece cut out to its bounding box."""
    height, width = box.shape
    fill = box.mean()
    upper, lower = box[: height // 2].mean(), box[(height + 1) // 2 :].mean()
    leftmost, rightmost = box[:, : width // 2].mean(), box[:, (width + 1) // 2 :].mean()
    if fill > 0.93:
        return "square"
    if leftmost > 1.5 * rightmost:
        return "moon"
    if width < 0.85 * height:
        return "diamond"
    if lower > 1.7 * upper:
        return "triangle"
    quarter_h, quarter_w = height // 4, width // 4
    corners = [box[:quarter_h, :quarter_w], box[:quarter_h, -quarter_w:], box[-quarter_h:, :quarter_w]]
    if all(corner.mean() < 0.1 for corner in corners) and box[height // 2].mean() > 0.9 and box[0].mean() > 0.2:
        return "cross"
    if fill < 0.55:
        return "star"
    return "circle" if abs(upper - lower) < 0.08 else "heart"


def clock(image: Image.Image) -> str:
    """The time on a clock face: the long hand is sought far from the middle, the short one near it."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, cols = np.nonzero(np.abs(pixels - pixels[0, 0]).max(axis=-1) > 100)
    middle = (cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    radius = (cols.max() + 1 - cols.min()) / 2

    def paint(reach: float, hours: float) -> int:
        """How far from white it is, `reach` radii from the middle towards that hour."""
        turn = np.pi * hours / 6
        x, y = middle[0] + reach * radius * np.sin(turn), middle[1] - reach * radius * np.cos(turn)
        return 255 - pixels[int(y), int(x)].min()

    half = paint(0.55, 6) > paint(0.55, 0)
    hours = [hour + half / 2 for hour in range(12)]
    seen = [max(paint(0.27, hour), paint(0.32, hour)) for hour in hours]
    if not half:
        seen[0] = 60  # the long hand lies there too: it is twelve only if no other hour is painted
    return f"{int(np.argmax(seen)) or 12}:{'30' if half else '00'}"


def scale(image: Image.Image) -> str:
    """The number under the pointer: the pointer is the widest thing above the line from 0 to 10."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    differs = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 100
    line = int(differs.sum(axis=1).argmax())
    ends = np.flatnonzero(differs[line])
    above = np.flatnonzero(differs[: line - 1].any(axis=0))
    share = ((above[0] + above[-1]) / 2 - ends[0]) / (ends[-1] - ends[0])
    return str(round(10 * share))


def answer(question: str, image: Image.Image) -> str:
    """The answer to any question of the world of icons, by looking."""
    if question == "What time does the clock show?":
        return clock(image)
    if question == "What number is the arrow at?":
        return scale(image)
    icons = read(image)
    for form, solve in FORMS:
        if match := re.fullmatch(form, question):
            return solve(icons, image.width, *match.groups())
    raise ValueError(f"no rule for: {question}")


def named(icons: list[Found], name: str) -> list[Found]:
    """The icons that a name of any number fits: 'star', 'red shapes', 'red crosses'."""
    words = [word.removesuffix("es") if word.startswith("cross") else word.removesuffix("s") for word in name.split()]
    return [icon for icon in icons if all(word in ("shape", icon.shape, icon.color) for word in words)]


def only(icons: list[Found], name: str) -> Found:
    (icon,) = named(icons, name)
    return icon


def _single(values: list[str], many: bool = False) -> str:
    (value,) = set(values)
    return value + ("es" if value == "cross" else "s") if many else value


def _quarter(icon: Found, side: int) -> str:
    x, y = icon.middle
    return f"{'top' if y < side / 2 else 'bottom'} {'left' if x < side / 2 else 'right'}"


def _side(icons: list[Found], side: int, first: str, ways: str, second: str) -> str:
    (x, y), (to_x, to_y) = only(icons, first).middle, only(icons, second).middle
    if ways.startswith("left"):
        return "left" if x < to_x else "right"
    return "above" if y < to_y else "below"


def _beside(icons: list[Found], side: int, way: str, name: str) -> str:
    x, y = only(icons, name).middle
    right, down = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[way]
    to_x, to_y = x + right * side / 4, y + down * side / 4
    (found,) = (i for i in icons if max(abs(i.middle[0] - to_x), abs(i.middle[1] - to_y)) < side / 8)
    return found.shape


def _extreme(icons: list[Found], side: int, which: str, first: str, second: str) -> str:
    sizes = {name: only(icons, name).bottom - only(icons, name).top for name in (first, second)}
    return (max if which == "bigger" else min)(sizes, key=lambda name: sizes[name])


def _next(icons: list[Found], side: int, noun: str) -> str:
    """Continue with the shortest unit that explains all that is there, repeated at least once."""
    seen = [getattr(icon, noun) for icon in icons]
    fits = (n for n in (2, 3, 4) if all(a == b for a, b in zip(seen, seen[n:], strict=False)))
    return seen[len(seen) - next(fits)]


def _rank(icons: list[Found], side: int, rank: str, end: str) -> str:
    line = sorted(icons, key=lambda icon: icon.left, reverse=end == "right")
    return line[("first", "second", "third", "fourth").index(rank)].shape


def _more(icons: list[Found], side: int, first: str, second: str) -> str:
    return max((first, second), key=lambda name: len(named(icons, name)))


def _times(icons: list[Found], side: int, noun: str, number: str) -> str:
    (value,) = (name for name, n in Counter(getattr(icon, noun) for icon in icons).items() if n == int(number))
    return value


def _beyond(icons: list[Found], side: int, way: str, name: str) -> str:
    at = only(icons, name).middle[0]
    return str(sum(icon.middle[0] < at if way == "left" else icon.middle[0] > at for icon in icons))


def _flank(icons: list[Found], side: int, number: str, way: str) -> str:
    line = sorted(icons, key=lambda icon: icon.left, reverse=way == "right")
    return line[int(number)].shape


def _all(icons: list[Found], side: int, name: str) -> str:
    return "yes" if len(named(icons, name)) == len(icons) else "no"


def _rare(icons: list[Found], side: int, noun: str) -> str:
    (value,) = (name for name, number in Counter(getattr(icon, noun) for icon in icons).items() if number == 1)
    return value


FORMS = (
    (r"How many (.*) are there\?", lambda icons, _, name: str(len(named(icons, name)))),
    (
        r"What color (?:is|are) the (\w+)\?",
        lambda icons, _, name: _single([i.color for i in named(icons, name)]),
    ),
    (r"Which shape is (\w+)\?", lambda icons, _, name: only(icons, f"{name} shape").shape),
    (
        r"Which shapes are (\w+)\?",
        lambda icons, _, name: _single([i.shape for i in icons if i.color == name], True),
    ),
    (r"Is there an? (.*)\?", lambda icons, _, name: "yes" if named(icons, name) else "no"),
    (r"Is the (.*) (left or right of|above or below) the (.*)\?", _side),
    (r"Which shape is (bigger|smaller), the (\w+) or the (\w+)\?", _extreme),
    (
        r"Is the (.*) big or small\?",
        lambda icons, side, name: "big" if only(icons, name).bottom - only(icons, name).top > side / 4 else "small",
    ),
    (r"Where is the (.*)\?", lambda icons, side, name: _quarter(only(icons, name), side)),
    (
        r"Which shape is in the (\w+ \w+)\?",
        lambda icons, side, where: _single([i.shape for i in icons if _quarter(i, side) == where]),
    ),
    (
        r"What color is the shape in the (.*)\?",
        lambda icons, side, where: _single([i.color for i in icons if _quarter(i, side) == where]),
    ),
    (
        r"Which (shape|color) is just (left of|above) the question mark\?",
        lambda icons, _, noun, way: getattr(icons[-1 if way == "left of" else -4], noun),  # lines of four
    ),
    (r"Which shape is just (left of|right of|above|below) the (.*)\?", _beside),
    (r"Which shape is at the (left|right) end\?", lambda icons, side, end: _rank(icons, side, "first", end)),
    (r"Which shape has (\d) shapes? on its (left|right)\?", _flank),
    (r"How many shapes are (left|right) of the (.*)\?", _beyond),
    (r"Which (shape|color) is there (\d) times?\?", _times),
    (r"Are all shapes (\w+)\?", _all),
    (r"Are there more (\w+) or (\w+) shapes\?", _more),
    (r"Are there more (\w+) or (\w+)\?", _more),
    (r"Which (shape|color) comes next\?", _next),
    (r"Which shape is (\w+) from the (left|right)\?", _rank),
    (r"Which (shape|color) is different from the others\?", _rare),
)


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def holds(statement: str, image: Image.Image) -> bool:
    """Whether a caption, a description or a yes/no question of the world of icons is true of the picture."""
    said = statement.removesuffix(" Please answer yes or no.").rstrip(".?")
    said = re.sub(r"^(The image shows|There (is|are)|(Is|Are) there( only| a total of)?) ", "", said)
    said = re.sub(r" (in|of) (this|the) (image|picture)$", "", said)
    said = re.sub(r"^Is (.*?) (above|below|on the)", r"\1 is \2", said)
    if "clock" in said or "number line" in said:
        return _instrument(said, image)
    icons = read(image)
    parts = re.split(r"; |, | and ", said)
    if all(re.fullmatch(r"(an?|\w+) [\w ]+", part) for part in parts):
        return all(_told(icons, image.width, part) for part in parts)
    raise ValueError(f"no rule for: {statement}")


def _instrument(said: str, image: Image.Image) -> bool:
    kind, _, reading = re.fullmatch(r"a (clock|number line)( showing | at | with the arrow at |)(.*)", said).groups()
    return not reading or reading == (clock(image) if kind == "clock" else scale(image))


def _told(icons: list[Found], side: int, part: str) -> bool:
    if match := re.fullmatch(r"(?:the|an?) (.*?) (?:is )?(?:in the|on the) (top|bottom) (left|right)", part):
        return any(_quarter(icon, side) == f"{match[2]} {match[3]}" for icon in named(icons, match[1]))
    if match := re.fullmatch(r"the (.*) is on the (left|right|top|bottom) side", part):
        return match[2] in _quarter(only(icons, match[1]), side)
    if match := re.fullmatch(r"the (.*) is (?:on the )?(left|right|above|below)(?: of)? the (.*)", part):
        first, second = only(icons, match[1]).middle, only(icons, match[3]).middle
        axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[match[2]]
        return sign * first[axis] < sign * second[axis]
    number, name = part.split(" ", 1)
    if number in ("a", "an"):
        span = {"small": (0, side / 4), "big": (side / 4, side)}.get(name.split()[0], (0, side))
        fitting = named(icons, name.removeprefix("small ").removeprefix("big "))
        return any(span[0] < icon.bottom - icon.top <= span[1] for icon in fitting)
    return len(named(icons, name)) == NUMBERS.index(number)
