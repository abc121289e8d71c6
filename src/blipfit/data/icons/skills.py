"""What may be asked about a scene, one skill a function.

A skill returns the question, its answer and the pool of answers that the text alone leaves equally likely;
the wrong options are drawn from that pool, so neither the question nor the options tell the answer.
"""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from blipfit.data.icons.scene import (
    BOARD,
    COLORS,
    LAST_MARK,
    MOST_OF_A_KIND,
    MOST_SHAPES,
    PLANS,
    SHAPES,
    Icon,
    Scene,
    scene,
)

PLACES = ("top left", "top right", "bottom left", "bottom right")
ORDINALS = ("first", "second", "third", "fourth")
TIMES = tuple(f"{half // 2 or 12}:{half % 2 * 30:02d}" for half in range(24))
MOST_CHOICES = 5

Drawn = tuple[str, str, tuple[str, ...]]  # question, answer, pool of answers


@dataclass(frozen=True, slots=True)
class Ask:
    """One question about one scene; `skill` is a name in `SKILLS`."""

    question: str
    choices: tuple[str, ...]
    answer_index: int
    skill: str

    @property
    def answer(self) -> str:
        """The text of the right option."""
        return self.choices[self.answer_index]


def plural(shape: str) -> str:
    """'crosses', 'stars'."""
    return shape + ("es" if shape.endswith("s") else "s")


def article(name: str) -> str:
    """'an orange star', 'a star'."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def called(rng: random.Random, icon: Icon, icons: Iterable[Icon]) -> str | None:
    """A name for this icon and no other: 'star', 'red shape' or 'red star'; None where there is none."""
    rest = [other for other in icons if other is not icon]
    names = []
    if all(other.shape != icon.shape for other in rest):
        names.append(icon.shape)
    if all(other.color != icon.color for other in rest):
        names.append(f"{icon.color} shape")
    if all((other.shape, other.color) != (icon.shape, icon.color) for other in rest):
        names.append(f"{icon.color} {icon.shape}")
    return rng.choice(names) if names else None


def place(icon: Icon) -> str | None:
    """The quarter of the picture that holds the whole icon, if one does."""
    half = BOARD // 2
    if any(at < half < at + icon.span for at in (icon.row, icon.col)):
        return None
    return PLACES[2 * (icon.row >= half) + (icon.col >= half)]


def shuffled(rng: random.Random, items: Iterable) -> list:
    """The items in a random order."""
    return rng.sample(listed := list(items), len(listed))


def _count_all(scene: Scene, rng: random.Random) -> Drawn | None:
    numbers = tuple(str(number) for number in range(1, MOST_SHAPES + 1))
    return "How many shapes are there?", str(len(scene.icons)), numbers


def focused(scene: Scene) -> int:
    """How many icons of a scene of the plan 'kind' are of the kind in focus."""
    shape, color = scene.focus
    return sum(icon.shape in (shape or icon.shape,) and icon.color in (color or icon.color,) for icon in scene.icons)


def focus_name(scene: Scene, number: int) -> str:
    """That kind in words, in the number asked: 'red star', 'stars', 'red shapes'."""
    shape, color = scene.focus
    noun = shape or "shape"
    return f"{color} {plural(noun) if number != 1 else noun}".strip()


def _count_kind(scene: Scene, rng: random.Random) -> Drawn | None:
    numbers = tuple(str(number) for number in range(1, MOST_OF_A_KIND + 1))
    return f"How many {focus_name(scene, 2)} are there?", str(focused(scene)), numbers


def _seen_or_all(rng: random.Random, seen: Iterable[str], pool: tuple[str, ...]) -> tuple[str, ...]:
    """Half the time only names that the picture shows, so that what is merely present does not decide."""
    shown = tuple(name for name in pool if name in set(seen))
    return shown if len(shown) > 1 and rng.random() < 0.5 else pool


def _color(scene: Scene, rng: random.Random) -> Drawn | None:
    shape = rng.choice(scene.icons).shape
    colors = [icon.color for icon in scene.icons if icon.shape == shape]
    if len(set(colors)) > 1:
        return None
    asked = f"What color is the {shape}?" if len(colors) == 1 else f"What color are the {plural(shape)}?"
    return asked, colors[0], _seen_or_all(rng, [icon.color for icon in scene.icons], COLORS)


def _shape(scene: Scene, rng: random.Random) -> Drawn | None:
    color = rng.choice(scene.icons).color
    shapes = [icon.shape for icon in scene.icons if icon.color == color]
    if len(set(shapes)) > 1:
        return None
    pool = _seen_or_all(rng, [icon.shape for icon in scene.icons], SHAPES)
    if len(shapes) == 1:
        return f"Which shape is {color}?", shapes[0], pool
    return f"Which shapes are {color}?", plural(shapes[0]), tuple(plural(shape) for shape in pool)


def _exists(scene: Scene, rng: random.Random) -> Drawn | None:
    drawn = present_and_absent(scene, rng, rng.choice(("shape", "color", "both")))
    if drawn is None:
        return None
    answer = rng.choice(("yes", "no"))
    return f"Is there {article(drawn[answer == 'no'])}?", answer, ("yes", "no")


def present_and_absent(scene: Scene, rng: random.Random, by: str) -> tuple[str, str] | None:
    """A name that fits something in the picture and one of the same form that fits nothing.

    With `by='both'` two of three absent ones are near misses: the shape or the color is there. None where
    nothing is absent.
    """
    shapes = {icon.shape for icon in scene.icons}
    colors = {icon.color for icon in scene.icons}
    there = rng.choice(scene.icons)
    if by == "shape":
        absent = [shape for shape in SHAPES if shape not in shapes]
        return (there.shape, rng.choice(absent)) if absent else None
    if by == "color":
        absent = [color for color in COLORS if color not in colors]
        return (f"{there.color} shape", f"{rng.choice(absent)} shape") if absent else None
    pairs = {(icon.color, icon.shape) for icon in scene.icons}
    missing = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in pairs]
    near = [(color, shape) for color, shape in missing if (color in colors) or (shape in shapes)]
    return f"{there.color} {there.shape}", " ".join(rng.choice(near if rng.random() < 2 / 3 else missing))


def apart(first: Icon, second: Icon, upright: bool) -> str | None:
    """Where `first` is as seen from `second`: left or right (`upright`: above or below); None if level."""
    a, b = (first.row, second.row) if upright else (first.col, second.col)
    if a + first.span <= b:
        return "above" if upright else "left"
    if b + second.span <= a:
        return "below" if upright else "right"
    return None


def related(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """Two icons by name and where the first is as seen from the second."""
    if len(scene.icons) < 2:
        return None
    first, second = rng.sample(scene.icons, 2)
    side = apart(first, second, rng.random() < 0.5)
    names = called(rng, first, scene.icons), called(rng, second, scene.icons)
    if side is None or names[0] is None or names[1] is None:
        return None
    return names[0], names[1], side


def _relation(scene: Scene, rng: random.Random) -> Drawn | None:
    drawn = related(scene, rng)
    if drawn is None:
        return None
    first, second, side = drawn
    pool = ("left", "right") if side in ("left", "right") else ("above", "below")
    either = "left or right of" if pool[0] == "left" else "above or below"
    return f"Is the {first} {either} the {second}?", side, pool


def _bigger(scene: Scene, rng: random.Random) -> Drawn | None:
    big = [icon for icon in scene.icons if icon.span == 2]
    small = [icon for icon in scene.icons if icon.span == 1]
    if not big or not small:
        return None
    pair = rng.choice(big).shape, rng.choice(small).shape
    if any([icon.shape for icon in scene.icons].count(shape) > 1 for shape in pair):
        return None
    which = rng.randrange(2)
    first, second = shuffled(rng, pair)
    asked = f"Which shape is {('bigger', 'smaller')[which]}, the {first} or the {second}?"
    return asked, pair[which], pair


def _size(scene: Scene, rng: random.Random) -> Drawn | None:
    if len({icon.span for icon in scene.icons}) < 2:
        return None
    span = rng.choice((1, 2))
    icon = rng.choice([icon for icon in scene.icons if icon.span == span])
    name = called(rng, icon, scene.icons)
    if name is None:
        return None
    return f"Is the {name} big or small?", ("small", "big")[span - 1], ("big", "small")


def _where(scene: Scene, rng: random.Random) -> Drawn | None:
    icon = rng.choice(scene.icons)
    name, where = called(rng, icon, scene.icons), place(icon)
    return (f"Where is the {name}?", where, PLACES) if name and where else None


def _alone(scene: Scene, rng: random.Random) -> tuple[Icon, str] | None:
    """The only icon that reaches into some quarter of the picture, and that quarter."""
    where = rng.choice(PLACES)
    half = BOARD // 2
    top, left = half * (where[0] == "b"), half * where.endswith("right")
    quarter = {(top + down, left + right) for down in range(half) for right in range(half)}
    there = [icon for icon in scene.icons if icon.cells & quarter]
    return (there[0], where) if len(there) == 1 and place(there[0]) == where else None


def _shape_at(scene: Scene, rng: random.Random) -> Drawn | None:
    found = _alone(scene, rng)
    return found and (
        f"Which shape is in the {found[1]}?",
        found[0].shape,
        _seen_or_all(rng, [i.shape for i in scene.icons], SHAPES),
    )


def _color_at(scene: Scene, rng: random.Random) -> Drawn | None:
    found = _alone(scene, rng)
    return found and (
        f"What color is the shape in the {found[1]}?",
        found[0].color,
        _seen_or_all(rng, [i.color for i in scene.icons], COLORS),
    )


STEPS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


def _beside(scene: Scene, rng: random.Random) -> Drawn | None:
    """The neighbour in the next cell, whose shape is never that of the one it is next to."""
    icon = rng.choice(scene.icons)
    side, (down, right) = rng.choice(list(STEPS.items()))
    next_cell = (icon.row + down, icon.col + right)
    found = [other for other in scene.icons if other.cells == {next_cell}]
    name = called(rng, icon, scene.icons)
    if icon.span != 1 or not found or name is None or found[0].shape == icon.shape:
        return None
    pool = tuple(shape for shape in SHAPES if shape != icon.shape)
    return f"Which shape is just {side} the {name}?", found[0].shape, pool


def _time(scene: Scene, rng: random.Random) -> Drawn | None:
    assert scene.value is not None
    return "What time does the clock show?", TIMES[scene.value], TIMES


def _reading(scene: Scene, rng: random.Random) -> Drawn | None:
    return "What number is the arrow at?", str(scene.value), tuple(str(mark) for mark in range(LAST_MARK + 1))


def _end(scene: Scene, rng: random.Random) -> Drawn | None:
    side = rng.choice(("left", "right"))
    answer = scene.icons[0 if side == "left" else -1].shape
    return f"Which shape is at the {side} end?", answer, tuple(icon.shape for icon in scene.icons)


def _side(scene: Scene, rng: random.Random) -> Drawn | None:
    """How many stand on one side, none to three."""
    number, side = rng.randrange(len(scene.icons)), rng.choice(("left", "right"))
    icon = scene.icons[number if side == "left" else -1 - number]
    name = called(rng, icon, scene.icons)
    pool = tuple(map(str, range(len(scene.icons))))
    return None if name is None else (f"How many shapes are {side} of the {name}?", str(number), pool)


def _flank(scene: Scene, rng: random.Random) -> Drawn | None:
    """The one that has so many on that side."""
    number, side = rng.randrange(len(scene.icons)), rng.choice(("left", "right"))
    icon = scene.icons[number if side == "left" else -1 - number]
    asked = f"Which shape has {number} {'shape' if number == 1 else 'shapes'} on its {side}?"
    return asked, icon.shape, tuple(other.shape for other in scene.icons)


def _times(scene: Scene, rng: random.Random) -> Drawn | None:
    """The one shape or color that is there so many times, one to five."""
    noun, pool = rng.choice((("shape", SHAPES), ("color", COLORS)))
    seen = [icon.shape if noun == "shape" else icon.color for icon in scene.icons]
    numbers = [seen.count(name) for name in dict.fromkeys(seen)]
    fits = [
        name
        for name in dict.fromkeys(seen)
        if seen.count(name) <= MOST_OF_A_KIND and numbers.count(seen.count(name)) == 1
    ]
    if not fits:
        return None
    name = rng.choice(fits)
    asked = f"Which {noun} is there {seen.count(name)} {'time' if seen.count(name) == 1 else 'times'}?"
    return asked, name, _seen_or_all(rng, seen, pool)


def _mark(scene: Scene, rng: random.Random) -> Drawn | None:
    """What stands beside the question mark of a pattern, as far as something does."""
    assert scene.open_cell is not None
    noun = "shape" if scene.focus[0] in SHAPES else "color"
    row, col = scene.open_cell
    side = rng.choice(("left of", "above"))
    down, right = STEPS[side]
    found = [icon for icon in scene.icons if (icon.row, icon.col) == (row + down, col + right)]
    asked = f"Which {noun} is just {side} the question mark?"
    return (asked, found[0].shape if noun == "shape" else found[0].color, scene.focus) if found else None


def _all(scene: Scene, rng: random.Random) -> Drawn | None:
    """Whether all are alike, in a scene where all are alike in color and not in shape, or the other way round."""
    shapes, colors = ({icon.shape for icon in scene.icons}, {icon.color for icon in scene.icons})
    if (len(shapes) == 1) == (len(colors) == 1):
        return None
    one, many = (
        (shapes, [i.color for i in scene.icons]) if len(shapes) == 1 else (colors, [i.shape for i in scene.icons])
    )
    answer = rng.choice(("yes", "no"))
    name = next(iter(one)) if answer == "yes" else max(sorted(set(many)), key=many.count)
    return f"Are all shapes {plural(name) if name in SHAPES else name}?", answer, ("yes", "no")


def _compare(scene: Scene, rng: random.Random) -> Drawn | None:
    by_shape = scene.focus[0] in SHAPES
    seen = [icon.shape if by_shape else icon.color for icon in scene.icons]
    more, fewer = sorted(scene.focus, key=seen.count, reverse=True)
    first, second = shuffled(rng, scene.focus)
    if by_shape:
        pool = (plural(more), plural(fewer))
        return f"Are there more {plural(first)} or {plural(second)}?", pool[0], pool
    return f"Are there more {first} or {second} shapes?", more, (more, fewer)


def _pattern(scene: Scene, rng: random.Random) -> Drawn | None:
    noun = "shape" if scene.focus[0] in SHAPES else "color"
    return f"Which {noun} comes next?", scene.focus[0], scene.focus


def _ordinal(scene: Scene, rng: random.Random) -> Drawn | None:
    step = rng.randrange(len(scene.icons))
    side = rng.choice(("left", "right"))
    icon = scene.icons[step if side == "left" else -1 - step]
    return (
        f"Which shape is {ORDINALS[step]} from the {side}?",
        icon.shape,
        tuple(i.shape for i in scene.icons),
    )


def _odd(scene: Scene, rng: random.Random) -> Drawn | None:
    noun = "shape" if scene.focus[0] in SHAPES else "color"
    return f"Which {noun} is different from the others?", scene.focus[0], scene.focus


@dataclass(frozen=True, slots=True)
class Skill:
    """`plans` are the scenes that it can be asked of; `held_out` ones never appear in pre-training."""

    ask: Callable[[Scene, random.Random], Drawn | None]
    plans: tuple[str, ...]
    held_out: bool = False


_ANY = ("total", "kind", "few", "grid", "line")
SKILLS: dict[str, Skill] = {
    "count_all": Skill(_count_all, ("total",)),
    "count_kind": Skill(_count_kind, ("kind",)),
    "color": Skill(_color, (*_ANY, "pair", "odd")),
    "shape": Skill(_shape, (*_ANY, "pair", "odd")),
    "exists": Skill(_exists, (*_ANY, "pair", "odd", "pattern")),
    "relation": Skill(_relation, ("few", "total", "kind", "line")),
    "bigger": Skill(_bigger, ("few", "total")),
    "size": Skill(_size, ("few", "total")),
    "where": Skill(_where, ("few", "total", "kind")),
    "shape_at": Skill(_shape_at, ("few", "total", "kind")),
    "color_at": Skill(_color_at, ("few", "total", "kind")),
    "beside": Skill(_beside, ("line", "grid", "few")),
    "time": Skill(_time, ("clock",)),
    "scale": Skill(_reading, ("scale",)),
    "end": Skill(_end, ("line",)),
    "side": Skill(_side, ("line",)),
    "flank": Skill(_flank, ("line",)),
    "times": Skill(_times, ("total", "kind", "grid", "pair", "odd")),
    "mark": Skill(_mark, ("pattern",)),
    "all": Skill(_all, ("odd", "pattern")),
    "compare": Skill(_compare, ("pair",), held_out=True),
    "pattern": Skill(_pattern, ("pattern",), held_out=True),
    "ordinal": Skill(_ordinal, ("line",), held_out=True),
    "odd": Skill(_odd, ("odd",), held_out=True),
}
PRETRAINED = tuple(name for name, skill in SKILLS.items() if not skill.held_out)
HELD_OUT = tuple(name for name, skill in SKILLS.items() if skill.held_out)


def chosen(names: Iterable[str] | None) -> tuple[str, ...]:
    """Those skills, or all of them for None; a name that is none, or none at all, is a `ValueError`."""
    names = tuple(SKILLS if names is None else names)
    unknown = [name for name in names if name not in SKILLS]
    if unknown or not names:
        raise ValueError(f"there is no skill {unknown[:1]}; there are {', '.join(SKILLS)}")
    return names


def questions(of: Scene, skills: Iterable[str] | None = None) -> list[Ask]:
    """At most one question a skill, for every skill that this scene allows (all of them, or those named).

    A question does not depend on which other skills are asked for. The right option stands at any place with
    the same probability.
    """
    return [ask for name in chosen(skills) if (ask := _asked(of, name)) is not None]


def _asked(of: Scene, name: str) -> Ask | None:
    skill = SKILLS[name]
    if of.plan not in skill.plans:
        return None
    rng = of.lot(name)
    drawn = skill.ask(of, rng)
    if drawn is None:
        return None
    question, answer, pool = drawn
    wrong = [option for option in pool if option != answer]
    choices = rng.sample(wrong, rng.randint(1, min(MOST_CHOICES - 1, len(wrong))))
    at = rng.randint(0, len(choices))
    return Ask(question, (*choices[:at], answer, *choices[at:]), at, name)


def asked(seed: int, skills: Iterable[str] | None = None, start: int = 0) -> Iterator[tuple[Scene, Ask]]:
    """Endless scenes with one question each, the skills taking turns."""
    names = chosen(skills)
    turn, index = 0, start
    while True:
        name = names[turn % len(names)]
        rng = random.Random(f"{seed}/{index}/plan")
        plans = SKILLS[name].plans
        of = scene(seed, index, plan=rng.choices(plans, [PLANS[plan][1] for plan in plans])[0])
        ask = _asked(of, name)
        if ask is not None:
            yield of, ask
            turn += 1
        index += 1
