"""What stands in a picture: icons on a 4 × 4 board of cells, a number line or a clock, drawn by lot.

A scene belongs to one plan. A plan fixes by lot whatever its questions ask (a count, a place, an hour) BEFORE
the rest is filled in, and treats shapes, colors and the four sides alike: that is what keeps every answer
equally likely to somebody who sees the text only.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
BACKGROUNDS = ("white", "gray", "cream", "sky")
BOARD = 4  # cells a side; a small icon fills one cell, a big one 2 × 2
MOST_SHAPES = 6  # in a scene whose total is asked
MOST_OF_A_KIND = 5
LAST_MARK = 10  # the number line runs from 0 to this


@dataclass(frozen=True, slots=True)
class Icon:
    """One shape; `row` and `col` name its (upper left) cell, `span` is 1 (small) or 2 (big) cells a side."""

    shape: str
    color: str
    row: int
    col: int
    span: int = 1

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of its middle, in cells from the upper left corner."""
        return self.row + self.span / 2, self.col + self.span / 2

    @property
    def cells(self) -> frozenset[tuple[int, int]]:
        """The cells that it covers."""
        covered = range(self.span)
        return frozenset((self.row + down, self.col + right) for down in covered for right in covered)


@dataclass(frozen=True, slots=True)
class Scene:
    """One picture before it is drawn.

    `kind` is what a person sees (scatter, grid, row, scale, clock); `plan` is how it was made, and decides
    which questions may be asked. `focus` holds what the plan fixed first, as text: the shape and/or color
    that is counted, the two that are compared, the continuation of a pattern, the odd one.
    `value` is the mark of a number line or the half hours since twelve of a clock; `look` is the appearance
    of those two (accent colors, shift), which no question asks for.
    """

    seed: int
    index: int
    kind: str
    plan: str
    background: str
    icons: tuple[Icon, ...] = ()
    focus: tuple[str, ...] = ()
    value: int | None = None
    look: tuple[str | int, ...] = field(default=())

    @property
    def picture(self) -> tuple:
        """All that is seen: two scenes of the same value are drawn alike."""
        return self.kind, self.background, frozenset(self.icons), self.value, self.look, self.open_cell

    @property
    def open_cell(self) -> tuple[int, int] | None:
        """Row and column of the question mark at the end of a pattern; None in every other picture."""
        if self.plan != "pattern":
            return None
        step = len(self.icons)
        return self.icons[0].row + step // BOARD, step % BOARD

    def lot(self, purpose: str) -> random.Random:
        """A random stream of this scene's own, one for each purpose."""
        return random.Random(f"{self.seed}/{self.index}/{purpose}")


def others(rng: random.Random, pool: Sequence[str], *taken: str) -> str:
    """One name of the pool that is none of `taken`."""
    return rng.choice([name for name in pool if name not in taken])


def _placed(rng: random.Random, kinds: Sequence[tuple[str, str]], spans: Sequence[int]) -> tuple[Icon, ...]:
    """Give every kind a place where nothing overlaps, all free places alike; the big ones first."""
    order = sorted(range(len(kinds)), key=lambda which: -spans[which])
    while True:
        taken: set[tuple[int, int]] = set()
        icons: dict[int, Icon] = {}
        for which in order:
            span = spans[which]
            room = range(BOARD - span + 1)
            free = [
                (row, col)
                for row in room
                for col in room
                if not any((row + down, col + right) in taken for down in range(span) for right in range(span))
            ]
            if not free:
                break
            icons[which] = Icon(*kinds[which], *rng.choice(free), span)
            taken |= icons[which].cells
        else:
            return tuple(icons[which] for which in range(len(kinds)))


def _spans(rng: random.Random, count: int, most_big: int = 2) -> list[int]:
    """Sizes for `count` icons: at most `most_big` big ones, so that they always find room."""
    big = rng.choice((0, 0, *range(1, most_big + 1)))
    spans = [2] * min(big, count) + [1] * max(0, count - big)
    rng.shuffle(spans)
    return spans


def _total(rng: random.Random) -> dict:
    """1 to 6 icons, every number as likely, in groups of the same kind."""
    count = rng.randint(1, MOST_SHAPES)
    groups = [(rng.choice(SHAPES), rng.choice(COLORS)) for _ in range(rng.randint(1, count))]
    kinds = groups + [rng.choice(groups) for _ in range(count - len(groups))]
    return {"icons": _placed(rng, kinds, _spans(rng, count))}


def _kind(rng: random.Random) -> dict:
    """1 to 5 icons of one shape, color or both, every number as likely, and up to three that are not."""
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    asked = rng.choice(("shape", "color", "both"))
    count = rng.randint(1, MOST_OF_A_KIND)
    one_look = rng.random() < 0.5
    kinds = []
    for _ in range(count):
        free_shape = shape if one_look else rng.choice(SHAPES)
        free_color = color if one_look else rng.choice(COLORS)
        kinds.append((free_shape if asked == "color" else shape, free_color if asked == "shape" else color))
    for _ in range(rng.randint(0, 3)):
        other = (others(rng, SHAPES, shape), others(rng, COLORS, color))
        if asked == "both":  # near misses: the shape in another color, the color in another shape
            other = rng.choice((other, (shape, other[1]), (other[0], color)))
        kinds.append(other)
    focus = {"shape": (shape, ""), "color": ("", color), "both": (shape, color)}[asked]
    return {"icons": _placed(rng, kinds, _spans(rng, len(kinds), 1)), "focus": focus}


def _few(rng: random.Random) -> dict:
    """2 to 4 icons that share neither shape nor color."""
    count = rng.randint(2, 4)
    kinds = list(zip(rng.sample(SHAPES, count), rng.sample(COLORS, count), strict=True))
    return {"icons": _placed(rng, kinds, _spans(rng, count))}


def _pair(rng: random.Random) -> dict:
    """Two shapes or two colors in different numbers, and sometimes one icon that is neither."""
    pool, free = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    first, second = rng.sample(pool, 2)
    counts = rng.sample(range(1, MOST_OF_A_KIND + 1), 2)
    names = [first] * counts[0] + [second] * counts[1]
    if len(names) < 8 and rng.random() < 0.3:
        names.append(others(rng, pool, first, second))
    looks = {name: rng.choice(free) for name in dict.fromkeys(names)}
    mixed = rng.random() < 0.5
    kinds = [(name, rng.choice(free) if mixed else looks[name]) for name in names]
    if pool is COLORS:
        kinds = [(shape, color) for color, shape in kinds]
    return {"icons": _placed(rng, kinds, [1] * len(kinds)), "focus": (first, second)}


def _block(rng: random.Random, rows: int, cols: int) -> list[tuple[int, int]]:
    """The cells of a full block of that size, somewhere on the board."""
    top, left = rng.randint(0, BOARD - rows), rng.randint(0, BOARD - cols)
    return [(top + row, left + col) for row in range(rows) for col in range(cols)]


def _grid(rng: random.Random) -> dict:
    """A full block of 4 to 12 icons of two to four kinds."""
    cells = _block(rng, *rng.choice(((2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2), (3, 4), (4, 3))))
    groups = [(rng.choice(SHAPES), rng.choice(COLORS)) for _ in range(rng.randint(2, 4))]
    return {"icons": tuple(Icon(*rng.choice(groups), *cell) for cell in cells)}


def _odd(rng: random.Random) -> dict:
    """A block or a scatter of 3 to 9 icons alike in shape or in color, except one."""
    if rng.random() < 0.5:
        cells = _block(rng, *rng.choice(((1, 4), (2, 2), (2, 3), (3, 2), (3, 3), (4, 1))))
    else:
        cells = rng.sample([(row, col) for row in range(BOARD) for col in range(BOARD)], rng.randint(3, 6))
    pool, free = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    usual, odd = rng.sample(pool, 2)
    looks = rng.sample(free, rng.choice((1, 1, 3)))
    names = [usual] * len(cells)
    names[rng.randrange(len(cells))] = odd
    kinds = [(name, rng.choice(looks)) for name in names]
    if pool is COLORS:
        kinds = [(shape, color) for color, shape in kinds]
    icons = tuple(Icon(*kind, *cell) for kind, cell in zip(kinds, cells, strict=True))
    return {"icons": icons, "focus": (odd, usual)}


def _line(rng: random.Random) -> dict:
    """A row of four icons that share neither shape nor color."""
    cells = _block(rng, 1, BOARD)
    kinds = zip(rng.sample(SHAPES, BOARD), rng.sample(COLORS, BOARD), strict=True)
    return {"icons": tuple(Icon(*kind, *cell) for kind, cell in zip(kinds, cells, strict=True))}


PATTERNS = ("ab", "aabb", "abba", "abcd")


def _pattern(rng: random.Random) -> dict:
    """A repeating sequence of shapes or colors, read in lines of four, whose next element is left open."""
    unit = rng.choice(PATTERNS)
    pool, free = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    names = rng.sample(pool, len(set(unit)))
    sequence = [names["abcd".index(unit[step % len(unit)])] for step in range(2 * BOARD)]
    length = rng.randint(len(unit) + 2 if len(unit) > 2 else 5, 2 * BOARD - 1)
    look, top = rng.choice(free), rng.randint(0, BOARD - 2)
    icons = []
    for step in range(length):
        shape, color = (sequence[step], look) if pool is SHAPES else (look, sequence[step])
        icons.append(Icon(shape, color, top + step // BOARD, step % BOARD))
    rest = [name for name in names if name != sequence[length]]
    return {"icons": tuple(icons), "focus": (sequence[length], *rest)}


def _scale(rng: random.Random) -> dict:
    """A number line from 0 to 10 with a pointer on one mark."""
    return {"value": rng.randint(0, LAST_MARK), "look": (rng.choice(COLORS), rng.randint(-10, 10))}


def _clock(rng: random.Random) -> dict:
    """A clock face on a whole or a half hour."""
    hand = others(rng, COLORS, "yellow")  # too pale on a white face
    look = (rng.choice(COLORS), hand, rng.randint(-2, 2), rng.randint(-2, 2))
    return {"value": rng.randrange(24), "look": look}


# plan: (kind, how often where nothing else is asked for, maker)
PLANS: dict[str, tuple[str, int, Callable[[random.Random], dict]]] = {
    "total": ("scatter", 4, _total),
    "kind": ("scatter", 5, _kind),
    "few": ("scatter", 5, _few),
    "pair": ("scatter", 1, _pair),
    "grid": ("grid", 2, _grid),
    "odd": ("grid", 1, _odd),
    "line": ("row", 2, _line),
    "pattern": ("row", 1, _pattern),
    "scale": ("scale", 2, _scale),
    "clock": ("clock", 2, _clock),
}
KINDS = ("scatter", "grid", "row", "scale", "clock")


def scene(seed: int, index: int, kind: str | None = None, plan: str | None = None) -> Scene:
    """The scene of that number in the endless series of that seed; the same for ever, whatever came before.

    `kind` or `plan` narrow the draw (a name outside `KINDS` or `PLANS` is a `ValueError`).
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"there is no kind of scene '{kind}'; there are {', '.join(KINDS)}")
    if plan is not None and plan not in PLANS:
        raise ValueError(f"there is no plan '{plan}'; there are {', '.join(PLANS)}")
    rng = random.Random(f"{seed}/{index}")
    names = [name for name, (its_kind, _, _) in PLANS.items() if kind in (None, its_kind)]
    drawn = plan or rng.choices(names, [PLANS[name][1] for name in names])[0]
    background = rng.choice(BACKGROUNDS)
    its_kind, _, make = PLANS[drawn]
    return Scene(seed, index, its_kind, drawn, background, **make(rng))
