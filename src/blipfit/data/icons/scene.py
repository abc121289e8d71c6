"""Random scenes: icons on a 4 × 4 board, number lines and clocks.

Every scene follows a plan. A plan first samples what its questions ask for (a count, a position, an hour), with all
values equally likely. Then it fills in the rest. It treats all shapes, all colors and all four directions alike, so
that a model which sees only the text finds every answer equally likely.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypedDict

SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "black")
BACKGROUNDS = ("white", "gray", "cream", "sky")
BOARD = 4  # cells per side of the board; a small icon fills one cell, a big icon 2 × 2
MAX_SHAPES = 6  # icons in a scene of the plan "total"
MAX_PER_KIND = 5  # icons of the shape or color that a question counts
LAST_MARK = 10  # the number line runs from 0 to this

Cell = tuple[int, int]  # row and column on the board, counted from 0 at the upper left
ShapeColor = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Icon:
    """One shape on the board."""

    shape: str
    """A name in `SHAPES`."""
    color: str
    """A name in `COLORS`."""
    row: int
    """Row of its upper left cell, counted from 0."""
    col: int
    """Column of its upper left cell, counted from 0."""
    span: int = 1
    """Cells per side: 1 (small) or 2 (big)."""

    @property
    def center(self) -> tuple[float, float]:
        """Row and column of its center, in cells from the upper left corner of the board."""
        return self.row + self.span / 2, self.col + self.span / 2

    @property
    def cells(self) -> frozenset[Cell]:
        """The cells that the icon covers."""
        offsets = range(self.span)
        return frozenset((self.row + down, self.col + right) for down in offsets for right in offsets)


@dataclass(frozen=True, slots=True)
class Scene:
    """The full description of one picture."""

    seed: int
    """Seed of the series that the scene belongs to."""
    index: int
    """Number of the scene in its series."""
    kind: str
    """What the picture shows, a name in `KINDS`: scatter, grid, row, scale (number line) or clock."""
    plan: str
    """How the scene was generated, a key of `PLANS`; it decides which questions fit the scene."""
    background: str
    """A name in `BACKGROUNDS`."""
    icons: tuple[Icon, ...] = ()
    """The icons on the board; empty for number lines and clocks."""
    focus: tuple[str, ...] = ()
    """Names that the plan sampled first, by plan:

    `kind`: the shape and the color that are counted ("" where any shape or any color counts);
    `pair`: the two shapes or colors that are compared; `odd`: the odd name, then the usual name;
    `pattern`: the next name, then the other names of the pattern.
    """
    value: int | None = None
    """The mark that the pointer of a number line is at, or the half hours since twelve on a clock."""
    appearance: tuple[str | int, ...] = ()
    """Colors and offsets of a number line or a clock, which no question asks for."""

    @property
    def picture_key(self) -> tuple[object, ...]:
        """Everything that is visible: two scenes with equal keys have identical pictures."""
        return self.kind, self.background, frozenset(self.icons), self.value, self.appearance, self.question_mark_cell

    @property
    def question_mark_cell(self) -> Cell | None:
        """The cell of the question mark at the end of a pattern; None in all other pictures."""
        if self.plan != "pattern":
            return None
        length = len(self.icons)
        return self.icons[0].row + length // BOARD, length % BOARD

    def make_rng(self, purpose: str) -> random.Random:
        """Make the random generator of this scene for one purpose; the purposes are independent of each other."""
        return random.Random(f"{self.seed}/{self.index}/{purpose}")


class SceneContent(TypedDict, total=False):
    """The fields of a `Scene` that its plan samples."""

    icons: tuple[Icon, ...]
    focus: tuple[str, ...]
    value: int
    appearance: tuple[str | int, ...]


def _sample_other(rng: random.Random, pool: Sequence[str], *excluded: str) -> str:
    """Sample a name of the pool that is not excluded."""
    return rng.choice([name for name in pool if name not in excluded])


def _place_icons(rng: random.Random, pairs: Sequence[ShapeColor], spans: Sequence[int]) -> tuple[Icon, ...]:
    """Place icons without overlap, big ones first; all free positions of an icon are equally likely.

    `pairs` and `spans` hold the shape and color and the size of every icon. The icons are returned in their order.
    """
    order = sorted(range(len(pairs)), key=lambda number: -spans[number])
    while True:  # until an attempt finds space for every icon
        occupied: set[Cell] = set()
        icons: dict[int, Icon] = {}
        for number in order:
            span = spans[number]
            starts = range(BOARD - span + 1)
            free = [
                (row, col)
                for row in starts
                for col in starts
                if not any((row + down, col + right) in occupied for down in range(span) for right in range(span))
            ]
            if not free:
                break
            icons[number] = Icon(*pairs[number], *rng.choice(free), span)
            occupied |= icons[number].cells
        else:
            return tuple(icons[number] for number in range(len(pairs)))


def _sample_spans(rng: random.Random, count: int, max_big: int = 2) -> list[int]:
    """Sample the sizes of `count` icons, at most `max_big` big ones, so that all of them fit on the board."""
    big = rng.choice((0, 0, *range(1, max_big + 1)))
    spans = [2] * min(big, count) + [1] * max(0, count - big)
    rng.shuffle(spans)
    return spans


def _sample_total(rng: random.Random) -> SceneContent:
    """Sample 1 to 6 icons, all numbers equally likely; several icons may have the same shape and color."""
    count = rng.randint(1, MAX_SHAPES)
    groups = [(rng.choice(SHAPES), rng.choice(COLORS)) for _ in range(rng.randint(1, count))]
    pairs = groups + [rng.choice(groups) for _ in range(count - len(groups))]
    return {"icons": _place_icons(rng, pairs, _sample_spans(rng, count))}


def _sample_kind(rng: random.Random) -> SceneContent:
    """Sample 1 to 5 icons of one shape, color or both, all numbers equally likely, and 0 to 3 different icons."""
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    criterion = rng.choice(("shape", "color", "both"))
    count = rng.randint(1, MAX_PER_KIND)
    identical = rng.random() < 0.5
    pairs = []
    for _ in range(count):
        any_shape = shape if identical else rng.choice(SHAPES)
        any_color = color if identical else rng.choice(COLORS)
        pairs.append((any_shape if criterion == "color" else shape, any_color if criterion == "shape" else color))
    for _ in range(rng.randint(0, 3)):
        other = (_sample_other(rng, SHAPES, shape), _sample_other(rng, COLORS, color))
        if criterion == "both":  # similar icons too: the same shape in another color, another shape in the same color
            other = rng.choice((other, (shape, other[1]), (other[0], color)))
        pairs.append(other)
    focus = {"shape": (shape, ""), "color": ("", color), "both": (shape, color)}[criterion]
    return {"icons": _place_icons(rng, pairs, _sample_spans(rng, len(pairs), 1)), "focus": focus}


def _sample_few(rng: random.Random) -> SceneContent:
    """Sample 2 to 4 icons with different shapes and different colors."""
    count = rng.randint(2, 4)
    pairs = list(zip(rng.sample(SHAPES, count), rng.sample(COLORS, count), strict=True))
    return {"icons": _place_icons(rng, pairs, _sample_spans(rng, count))}


def _sample_pair(rng: random.Random) -> SceneContent:
    """Sample two shapes or two colors in different numbers, and sometimes one icon with neither of them."""
    pool, other_pool = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    first, second = rng.sample(pool, 2)
    counts = rng.sample(range(1, MAX_PER_KIND + 1), 2)
    names = [first] * counts[0] + [second] * counts[1]
    if len(names) < 8 and rng.random() < 0.3:
        names.append(_sample_other(rng, pool, first, second))
    partners = {name: rng.choice(other_pool) for name in dict.fromkeys(names)}
    mixed = rng.random() < 0.5
    pairs = [(name, rng.choice(other_pool) if mixed else partners[name]) for name in names]
    if pool is COLORS:
        pairs = [(shape, color) for color, shape in pairs]
    return {"icons": _place_icons(rng, pairs, [1] * len(pairs)), "focus": (first, second)}


def _sample_block(rng: random.Random, rows: int, cols: int) -> list[Cell]:
    """Sample the position of a block of `rows` × `cols` cells and return its cells row by row."""
    top, left = rng.randint(0, BOARD - rows), rng.randint(0, BOARD - cols)
    return [(top + row, left + col) for row in range(rows) for col in range(cols)]


def _sample_grid(rng: random.Random) -> SceneContent:
    """Sample a full block of 4 to 12 icons from two to four pairs of shape and color."""
    cells = _sample_block(rng, *rng.choice(((2, 2), (2, 3), (3, 2), (3, 3), (2, 4), (4, 2), (3, 4), (4, 3))))
    groups = [(rng.choice(SHAPES), rng.choice(COLORS)) for _ in range(rng.randint(2, 4))]
    return {"icons": tuple(Icon(*rng.choice(groups), *cell) for cell in cells)}


def _sample_odd(rng: random.Random) -> SceneContent:
    """Sample 3 to 9 icons, in a block or scattered, that all have the same shape or color except one."""
    if rng.random() < 0.5:
        cells = _sample_block(rng, *rng.choice(((1, 4), (2, 2), (2, 3), (3, 2), (3, 3), (4, 1))))
    else:
        cells = rng.sample([(row, col) for row in range(BOARD) for col in range(BOARD)], rng.randint(3, 6))
    pool, other_pool = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    usual_name, odd_name = rng.sample(pool, 2)
    partners = rng.sample(other_pool, rng.choice((1, 1, 3)))
    names = [usual_name] * len(cells)
    names[rng.randrange(len(cells))] = odd_name
    pairs = [(name, rng.choice(partners)) for name in names]
    if pool is COLORS:
        pairs = [(shape, color) for color, shape in pairs]
    icons = tuple(Icon(*pair, *cell) for pair, cell in zip(pairs, cells, strict=True))
    return {"icons": icons, "focus": (odd_name, usual_name)}


def _sample_line(rng: random.Random) -> SceneContent:
    """Sample a row of four icons with different shapes and different colors."""
    cells = _sample_block(rng, 1, BOARD)
    pairs = zip(rng.sample(SHAPES, BOARD), rng.sample(COLORS, BOARD), strict=True)
    return {"icons": tuple(Icon(*pair, *cell) for pair, cell in zip(pairs, cells, strict=True))}


PATTERNS = ("ab", "aabb", "abba", "abcd")


def _sample_pattern(rng: random.Random) -> SceneContent:
    """Sample the start of a repeating sequence of shapes or colors, in rows of four; the next element is left out."""
    unit = rng.choice(PATTERNS)
    pool, other_pool = rng.choice(((SHAPES, COLORS), (COLORS, SHAPES)))
    names = rng.sample(pool, len(set(unit)))
    sequence = [names["abcd".index(unit[step % len(unit)])] for step in range(2 * BOARD)]
    length = rng.randint(len(unit) + 2 if len(unit) > 2 else 5, 2 * BOARD - 1)
    partner, top = rng.choice(other_pool), rng.randint(0, BOARD - 2)
    icons = []
    for step in range(length):
        shape, color = (sequence[step], partner) if pool is SHAPES else (partner, sequence[step])
        icons.append(Icon(shape, color, top + step // BOARD, step % BOARD))
    other_names = [name for name in names if name != sequence[length]]
    return {"icons": tuple(icons), "focus": (sequence[length], *other_names)}


def _sample_scale(rng: random.Random) -> SceneContent:
    """Sample a number line from 0 to 10 with a pointer at one mark; the appearance is (pointer color, offset down)."""
    return {"value": rng.randint(0, LAST_MARK), "appearance": (rng.choice(COLORS), rng.randint(-10, 10))}


def _sample_clock(rng: random.Random) -> SceneContent:
    """Sample a clock at a full or a half hour; the appearance is (rim color, hand color, offsets right and down)."""
    hand_color = _sample_other(rng, COLORS, "yellow")  # yellow is too pale on the white face
    appearance = (rng.choice(COLORS), hand_color, rng.randint(-2, 2), rng.randint(-2, 2))
    return {"value": rng.randrange(24), "appearance": appearance}


@dataclass(frozen=True, slots=True)
class Plan:
    """One way to generate scenes."""

    kind: str
    """The kind of its scenes, a name in `KINDS`."""
    weight: int
    """Its relative frequency among the plans that a series may use."""
    sample: Callable[[random.Random], SceneContent]
    """Samples the content of a scene."""


PLANS: dict[str, Plan] = {
    "total": Plan("scatter", 4, _sample_total),
    "kind": Plan("scatter", 5, _sample_kind),
    "few": Plan("scatter", 5, _sample_few),
    "pair": Plan("scatter", 1, _sample_pair),
    "grid": Plan("grid", 2, _sample_grid),
    "odd": Plan("grid", 1, _sample_odd),
    "line": Plan("row", 2, _sample_line),
    "pattern": Plan("row", 1, _sample_pattern),
    "scale": Plan("scale", 2, _sample_scale),
    "clock": Plan("clock", 2, _sample_clock),
}
KINDS = ("scatter", "grid", "row", "scale", "clock")


def make_scene(seed: int, index: int, kind: str | None = None, plan: str | None = None) -> Scene:
    """Make scene number `index` of the endless series of `seed`.

    The same arguments always give the same scene; it does not depend on scenes made before. `kind` restricts the
    scene to the plans of that kind, `plan` to that plan.

    Raises ValueError if `kind` is not in `KINDS` or `plan` is not in `PLANS`.
    """
    if kind is not None and kind not in KINDS:
        raise ValueError(f"unknown scene kind '{kind}'; expected one of {', '.join(KINDS)}")
    if plan is not None and plan not in PLANS:
        raise ValueError(f"unknown scene plan '{plan}'; expected one of {', '.join(PLANS)}")
    rng = random.Random(f"{seed}/{index}")
    names = [name for name, candidate in PLANS.items() if kind in (None, candidate.kind)]
    plan_name = plan or rng.choices(names, [PLANS[name].weight for name in names])[0]
    background = rng.choice(BACKGROUNDS)
    content = PLANS[plan_name].sample(rng)
    return Scene(seed, index, PLANS[plan_name].kind, plan_name, background, **content)
