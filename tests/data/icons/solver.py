"""A solver that answers questions about icons from the pixels alone.

It does not use the generator's code. The background is the most frequent color. The other pixels form connected
regions. The color of a region is the nearest of eight named colors, and its shape follows from how its pixels are
distributed in its bounding box.
"""

import re
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

COLOR_RGB = {
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
class Detection:
    """One icon: its names and its bounding box in pixels (right and bottom are exclusive)."""

    shape: str
    color: str
    left: int
    top: int
    right: int
    bottom: int

    @property
    def center(self) -> tuple[float, float]:
        """x and y in pixels."""
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2

    @property
    def height(self) -> int:
        return self.bottom - self.top


def detect(image: Image.Image) -> list[Detection]:
    """Detect all icons of a picture, row by row."""
    return _detect(image.tobytes(), image.width)


@lru_cache(maxsize=8)
def _detect(data: bytes, side: int) -> list[Detection]:
    pixels = np.frombuffer(data, dtype=np.uint8).reshape(side, side, 3).astype(int)
    colors, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    difference = np.abs(pixels - colors[counts.argmax()]).max(axis=-1)
    icons = [_classify_region(pixels, region) for region in _find_regions(difference > 100)]
    return sorted((icon for icon in icons if icon.color != "sign"), key=lambda icon: (icon.top // 8, icon.left))


def _find_regions(foreground: np.ndarray) -> list[list[tuple[int, int]]]:
    """Return the pixels (row, column) of every connected region."""
    remaining = set(zip(*map(np.ndarray.tolist, np.nonzero(foreground)), strict=True))
    regions = []
    while remaining:
        region, queue = [], [remaining.pop()]
        while queue:
            row, col = queue.pop()
            region.append((row, col))
            neighbors = {(row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)} & remaining
            remaining -= neighbors
            queue += neighbors
        regions.append(region)
    return regions


def _classify_region(pixels: np.ndarray, region: list[tuple[int, int]]) -> Detection:
    rows, cols = np.array(region).T
    top, left = rows.min(), cols.min()
    box = np.zeros((rows.max() + 1 - top, cols.max() + 1 - left), dtype=bool)
    box[rows - top, cols - left] = True
    distances = np.abs(pixels[rows, cols][:, None] - np.array(list(COLOR_RGB.values()))).sum(axis=-1)
    color = list(COLOR_RGB)[np.bincount(distances.argmin(axis=1)).argmax()]
    return Detection(_classify_shape(box), color, left, top, left + box.shape[1], top + box.shape[0])


def _classify_shape(box: np.ndarray) -> str:
    """Return the shape of a region from its mask, cropped to its bounding box."""
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


def read_clock(image: Image.Image) -> str:
    """Return the time on a clock: the long hand is searched far from the center, the short hand near it."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    rows, cols = np.nonzero(np.abs(pixels - pixels[0, 0]).max(axis=-1) > 100)
    center = (cols.min() + cols.max() + 1) / 2, (rows.min() + rows.max() + 1) / 2
    radius = (cols.max() + 1 - cols.min()) / 2

    def darkness(distance: float, hour: float) -> int:
        """How much darker than white the pixel is at `distance` radii from the center in the direction of an hour."""
        angle = np.pi * hour / 6
        x, y = center[0] + distance * radius * np.sin(angle), center[1] - distance * radius * np.cos(angle)
        return 255 - pixels[int(y), int(x)].min()

    half = darkness(0.55, 6) > darkness(0.55, 0)
    hours = [hour + half / 2 for hour in range(12)]
    scores = [max(darkness(0.27, hour), darkness(0.32, hour)) for hour in hours]
    if not half:
        scores[0] = 60  # the long hand points to twelve too: it is twelve only if no other hour is dark
    return f"{int(np.argmax(scores)) or 12}:{'30' if half else '00'}"


def read_number_line(image: Image.Image) -> str:
    """Return the number at the pointer, which is the only thing above the line from 0 to 10."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    foreground = np.abs(pixels - pixels[0, 0]).max(axis=-1) > 100
    line = int(foreground.sum(axis=1).argmax())
    ends = np.flatnonzero(foreground[line])
    pointer = np.flatnonzero(foreground[: line - 1].any(axis=0))
    fraction = ((pointer[0] + pointer[-1]) / 2 - ends[0]) / (ends[-1] - ends[0])
    return str(round(10 * fraction))


def answer(question: str, image: Image.Image) -> str:
    """Answer any question about icons from the picture."""
    if question == "What time does the clock show?":
        return read_clock(image)
    if question == "What number is the arrow at?":
        return read_number_line(image)
    icons = detect(image)
    for form, solve in FORMS:
        if match := re.fullmatch(form, question):
            return solve(icons, image.width, *match.groups())
    raise ValueError(f"no rule for: {question}")


def select(icons: list[Detection], name: str) -> list[Detection]:
    """Return the icons that a name in the singular or plural fits: 'star', 'red shapes', 'red crosses'."""
    words = [word.removesuffix("es") if word.startswith("cross") else word.removesuffix("s") for word in name.split()]
    return [icon for icon in icons if all(word in ("shape", icon.shape, icon.color) for word in words)]


def select_single(icons: list[Detection], name: str) -> Detection:
    """Return the only icon that a name fits."""
    (icon,) = select(icons, name)
    return icon


def _get_common(values: list[str], plural: bool = False) -> str:
    """Return the value that all list elements share."""
    (value,) = set(values)
    return value + ("es" if value == "cross" else "s") if plural else value


def _find_quarter(icon: Detection, side: int) -> str:
    x, y = icon.center
    return f"{'top' if y < side / 2 else 'bottom'} {'left' if x < side / 2 else 'right'}"


def _solve_relation(icons: list[Detection], side: int, first: str, directions: str, second: str) -> str:
    (first_x, first_y), (second_x, second_y) = (select_single(icons, name).center for name in (first, second))
    if directions.startswith("left"):
        return "left" if first_x < second_x else "right"
    return "above" if first_y < second_y else "below"


def _solve_beside(icons: list[Detection], side: int, direction: str, name: str) -> str:
    x, y = select_single(icons, name).center
    right, down = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}[direction]
    target_x, target_y = x + right * side / 4, y + down * side / 4
    (neighbor,) = (
        icon for icon in icons if max(abs(icon.center[0] - target_x), abs(icon.center[1] - target_y)) < side / 8
    )
    return neighbor.shape


def _solve_bigger(icons: list[Detection], side: int, comparative: str, first: str, second: str) -> str:
    heights = {name: select_single(icons, name).height for name in (first, second)}
    return (max if comparative == "bigger" else min)(heights, key=lambda name: heights[name])


def _solve_pattern(icons: list[Detection], side: int, noun: str) -> str:
    """Continue the sequence with its shortest period, which must repeat at least once."""
    names = [getattr(icon, noun) for icon in icons]
    periods = (n for n in (2, 3, 4) if all(a == b for a, b in zip(names, names[n:], strict=False)))
    return names[len(names) - next(periods)]


def _solve_ordinal(icons: list[Detection], side: int, ordinal: str, end: str) -> str:
    line = sorted(icons, key=lambda icon: icon.left, reverse=end == "right")
    return line[("first", "second", "third", "fourth").index(ordinal)].shape


def _solve_compare(icons: list[Detection], side: int, first: str, second: str) -> str:
    return max((first, second), key=lambda name: len(select(icons, name)))


def _solve_times(icons: list[Detection], side: int, noun: str, number: str) -> str:
    (name,) = (name for name, n in Counter(getattr(icon, noun) for icon in icons).items() if n == int(number))
    return name


def _solve_side(icons: list[Detection], side: int, direction: str, name: str) -> str:
    x = select_single(icons, name).center[0]
    return str(sum(icon.center[0] < x if direction == "left" else icon.center[0] > x for icon in icons))


def _solve_flank(icons: list[Detection], side: int, number: str, direction: str) -> str:
    line = sorted(icons, key=lambda icon: icon.left, reverse=direction == "right")
    return line[int(number)].shape


def _solve_all(icons: list[Detection], side: int, name: str) -> str:
    return "yes" if len(select(icons, name)) == len(icons) else "no"


def _solve_odd(icons: list[Detection], side: int, noun: str) -> str:
    (name,) = (name for name, number in Counter(getattr(icon, noun) for icon in icons).items() if number == 1)
    return name


FORMS = (
    (r"How many (.*) are there\?", lambda icons, _, name: str(len(select(icons, name)))),
    (
        r"What color (?:is|are) the (\w+)\?",
        lambda icons, _, name: _get_common([icon.color for icon in select(icons, name)]),
    ),
    (r"Which shape is (\w+)\?", lambda icons, _, name: select_single(icons, f"{name} shape").shape),
    (
        r"Which shapes are (\w+)\?",
        lambda icons, _, name: _get_common([icon.shape for icon in icons if icon.color == name], plural=True),
    ),
    (r"Is there an? (.*)\?", lambda icons, _, name: "yes" if select(icons, name) else "no"),
    (r"Is the (.*) (left or right of|above or below) the (.*)\?", _solve_relation),
    (r"Which shape is (bigger|smaller), the (\w+) or the (\w+)\?", _solve_bigger),
    (
        r"Is the (.*) big or small\?",
        lambda icons, side, name: "big" if select_single(icons, name).height > side / 4 else "small",
    ),
    (r"Where is the (.*)\?", lambda icons, side, name: _find_quarter(select_single(icons, name), side)),
    (
        r"Which shape is in the (\w+ \w+)\?",
        lambda icons, side, quarter: _get_common([i.shape for i in icons if _find_quarter(i, side) == quarter]),
    ),
    (
        r"What color is the shape in the (.*)\?",
        lambda icons, side, quarter: _get_common([i.color for i in icons if _find_quarter(i, side) == quarter]),
    ),
    (
        r"Which (shape|color) is just (left of|above) the question mark\?",
        lambda icons, _, noun, direction: getattr(icons[-1 if direction == "left of" else -4], noun),  # rows of four
    ),
    (r"Which shape is just (left of|right of|above|below) the (.*)\?", _solve_beside),
    (r"Which shape is at the (left|right) end\?", lambda icons, side, end: _solve_ordinal(icons, side, "first", end)),
    (r"Which shape has (\d) shapes? on its (left|right)\?", _solve_flank),
    (r"How many shapes are (left|right) of the (.*)\?", _solve_side),
    (r"Which (shape|color) is there (\d) times?\?", _solve_times),
    (r"Are all shapes (\w+)\?", _solve_all),
    (r"Are there more (\w+) or (\w+) shapes\?", _solve_compare),
    (r"Are there more (\w+) or (\w+)\?", _solve_compare),
    (r"Which (shape|color) comes next\?", _solve_pattern),
    (r"Which shape is (\w+) from the (left|right)\?", _solve_ordinal),
    (r"Which (shape|color) is different from the others\?", _solve_odd),
)


NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")


def is_true(statement: str, image: Image.Image) -> bool:
    """Return whether a caption, a description or a yes/no question is true of the picture."""
    text = statement.removesuffix(" Please answer yes or no.").rstrip(".?")
    text = re.sub(r"^(The image shows|There (is|are)|(Is|Are) there( only| a total of)?) ", "", text)
    text = re.sub(r" (in|of) (this|the) (image|picture)$", "", text)
    text = re.sub(r"^Is (.*?) (above|below|on the)", r"\1 is \2", text)
    if "clock" in text or "number line" in text:
        return _is_instrument_true(text, image)
    icons = detect(image)
    parts = re.split(r"; |, | and ", text)
    if all(re.fullmatch(r"(an?|\w+) [\w ]+", part) for part in parts):
        return all(_is_part_true(icons, image.width, part) for part in parts)
    raise ValueError(f"no rule for: {statement}")


def _is_instrument_true(text: str, image: Image.Image) -> bool:
    kind, _, value = re.fullmatch(r"a (clock|number line)( showing | at | with the arrow at |)(.*)", text).groups()
    return not value or value == (read_clock(image) if kind == "clock" else read_number_line(image))


def _is_part_true(icons: list[Detection], side: int, part: str) -> bool:
    if match := re.fullmatch(r"(?:the|an?) (.*?) (?:is )?(?:in the|on the) (top|bottom) (left|right)", part):
        return any(_find_quarter(icon, side) == f"{match[2]} {match[3]}" for icon in select(icons, match[1]))
    if match := re.fullmatch(r"the (.*) is on the (left|right|top|bottom) side", part):
        return match[2] in _find_quarter(select_single(icons, match[1]), side)
    if match := re.fullmatch(r"the (.*) is (?:on the )?(left|right|above|below)(?: of)? the (.*)", part):
        first, second = select_single(icons, match[1]).center, select_single(icons, match[3]).center
        axis, sign = {"left": (0, 1), "right": (0, -1), "above": (1, 1), "below": (1, -1)}[match[2]]
        return sign * first[axis] < sign * second[axis]
    number, name = part.split(" ", 1)
    if number in ("a", "an"):
        low, high = {"small": (0, side / 4), "big": (side / 4, side)}.get(name.split()[0], (0, side))
        candidates = select(icons, name.removeprefix("small ").removeprefix("big "))
        return any(low < icon.height <= high for icon in candidates)
    return len(select(icons, name)) == NUMBERS.index(number)
