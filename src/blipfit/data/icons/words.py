"""What may be told about a scene: captions, yes/no pairs as in MME, a true and a false description."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blipfit.data.icons.scene import (
    BOARD,
    COLORS,
    LAST_MARK,
    MOST_OF_A_KIND,
    MOST_SHAPES,
    SHAPES,
    Icon,
    Scene,
)
from blipfit.data.icons.skills import (
    PLACES,
    TIMES,
    article,
    focus_name,
    focused,
    place,
    plural,
    present_and_absent,
    related,
    shuffled,
)

NUMBERS = (
    "no",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)
SUBTASKS = ("existence", "count", "position", "color")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
QUERIES = ("Describe this image in detail.", "Describe this image.", "What is in the image?")


def counted(number: int, noun: str) -> str:
    """'one red star', 'two red stars'."""
    return f"{NUMBERS[number]} {plural(noun) if number > 1 else noun}"


def joined(parts: Sequence[str]) -> str:
    """'a, b and c'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _side(side: str) -> str:
    return f"{side} of" if side in ("left", "right") else side


def _groups(icons: Sequence[Icon]) -> Counter[str]:
    return Counter(f"{icon.color} {icon.shape}" for icon in icons)


def captions(scene: Scene) -> list[str]:
    """True statements about the picture in small letters, from one thing in it to everything in it."""
    if scene.value is not None:
        if scene.kind == "clock":
            return ["a clock", f"a clock showing {TIMES[scene.value]}"]
        return ["a number line", f"a number line with the arrow at {scene.value}"]
    rng = scene.lot("captions")
    groups = shuffled(rng, [counted(number, name) for name, number in _groups(scene.icons).items()])
    shapes = Counter(icon.shape for icon in scene.icons)
    colors = Counter(icon.color for icon in scene.icons)
    icon = rng.choice(scene.icons)
    told = [
        article(f"{icon.color} {icon.shape}"),
        article(f"{('small', 'big')[icon.span - 1]} {icon.color} {icon.shape}"),
        counted(len(scene.icons), "shape"),
        joined(shuffled(rng, [counted(number, shape) for shape, number in shapes.items()])),
        joined(shuffled(rng, [counted(number, f"{color} shape") for color, number in colors.items()])),
        groups[0],
    ]
    if where := place(icon):
        told.append(f"{article(f'{icon.color} {icon.shape}')} in the {where}")
    if relation := related(scene, rng):
        first, second, side = relation
        told.append(f"the {first} is {_side(side)} the {second}")
    told.append(joined(groups))
    if placed := [f"the {icon.color} {icon.shape} is in the {where}" for icon, where in _sure(scene)]:
        told.append(f"{joined(groups)}; {joined(shuffled(rng, placed)[:3])}")
    return list(dict.fromkeys(told))


def _sure(scene: Scene) -> list[tuple[Icon, str]]:
    """The icons of which there is only one, with the quarter where they stand."""
    groups = _groups(scene.icons)
    places = [(icon, place(icon)) for icon in scene.icons if groups[f"{icon.color} {icon.shape}"] == 1]
    return [(icon, where) for icon, where in places if where]


@dataclass(frozen=True, slots=True)
class YesNo:
    """Two questions about one picture in MME's wording: `yes` is true of it, `no` is not."""

    subtask: str
    yes: str
    no: str


def _please(question: str) -> str:
    return f"{question} Please answer yes or no."


def _total_of(number: int, name: str, names: str) -> str:
    """MME's way to ask for a number."""
    if number == 1:
        return _please(f"Is there only one {name} in the image?")
    return _please(f"Are there a total of {NUMBERS[number]} {names} in the image?")


def _counts(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if scene.plan == "kind":
        right, most, names = focused(scene), MOST_OF_A_KIND, (focus_name(scene, 1), focus_name(scene, 2))
    elif scene.plan == "total":
        right, most, names = len(scene.icons), MOST_SHAPES, ("shape", "shapes")
    else:
        return None
    wrong = rng.choice([number for number in range(1, most + 1) if number != right])
    return _total_of(right, *names), _total_of(wrong, *names)


def _existence(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    names = present_and_absent(scene, rng, "shape")
    if names is None:
        return None
    yes, no = (_please(f"Is there {article(name)} in this image?") for name in names)
    return yes, no


def _colors(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """The same shape in a color that it has and in one that it has not; half the time one that is there."""
    icon = rng.choice(scene.icons)
    its = {other.color for other in scene.icons if other.shape == icon.shape}
    wrong = [color for color in COLORS if color not in its]
    shown = [color for color in wrong if any(other.color == color for other in scene.icons)]
    if not wrong:
        return None
    color = rng.choice(shown if shown and rng.random() < 0.5 else wrong)
    yes, no = (_please(f"Is there {article(f'{name} {icon.shape}')} in the image?") for name in (icon.color, color))
    return yes, no


def _positions(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """One icon as seen from another, or the half of the picture in which the only one of its shape stands."""
    if scene.plan == "pattern":  # always starts at the left: the answer would be known
        return None
    if rng.random() < 0.5 and (relation := related(scene, rng)):
        first, second, side = relation
        asked = [_beside(first, second, name) for name in (side, OPPOSITE[side])]
        return asked[0], asked[1]
    icon = rng.choice(scene.icons)
    half = BOARD // 2
    upright = rng.random() < 0.5
    at = icon.row if upright else icon.col
    if [other.shape for other in scene.icons].count(icon.shape) > 1 or at < half < at + icon.span:
        return None
    sides = ("top", "bottom") if upright else ("left", "right")
    ordered = sides if at < half else sides[::-1]
    yes, no = (_please(f"Is the {icon.shape} on the {side} side of the picture?") for side in ordered)
    return yes, no


def _beside(first: str, second: str, side: str) -> str:
    relation = f"on the {side} of" if side in ("left", "right") else side
    return _please(f"Is the {first} {relation} the {second}?")


_PAIRS = {"existence": _existence, "count": _counts, "position": _positions, "color": _colors}


def yes_no(scene: Scene) -> list[YesNo]:
    """At most one pair a subtask of MME that this picture allows (none for clocks and number lines)."""
    if not scene.icons:
        return []
    drawn = [(subtask, _PAIRS[subtask](scene, scene.lot(f"mme/{subtask}"))) for subtask in SUBTASKS]
    return [YesNo(subtask, *pair) for subtask, pair in drawn if pair is not None]


@dataclass(frozen=True, slots=True)
class Preference:
    """A request, a true description and the same one with one planted error (`error` names its sort)."""

    query: str
    good: str
    bad: str
    error: str


def preference(scene: Scene) -> Preference | None:
    """A pair of descriptions that differ in one word or number; None where the plan allows no fair one.

    Fair: the false one must be as likely a description as the true one, or the text would betray it. So only
    what the plan drew evenly is falsified, and only into what could have been drawn.
    """
    rng = scene.lot("preference")
    sorts = {
        "total": (_kinds_told,),
        "few": (_kinds_told, _places_told),
        "line": (_kinds_told,),
        "kind": (_count_told,),
        "clock": (_value_told,),
        "scale": (_value_told,),
    }.get(scene.plan, ())
    told = rng.choice(sorts)(scene, rng) if sorts else None
    return told and Preference(rng.choice(QUERIES), *told)


def _kinds_told(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    groups = list(Counter((icon.color, icon.shape) for icon in scene.icons).items())
    rng.shuffle(groups)
    which = rng.randrange(len(groups))
    (color, shape), number = groups[which]
    error = rng.choice(("color", "shape"))
    if error == "color":
        planted = (rng.choice([name for name in COLORS if name != color]), shape)
    else:
        planted = (color, rng.choice([name for name in SHAPES if name != shape]))
    rest = [kind for kind, _ in groups if kind != (color, shape)]
    # What could have been drawn: other kinds only, and on the other plans no name twice.
    if planted in rest or (
        scene.plan != "total" and any(p == q for kind in rest for p, q in zip(planted, kind, strict=True))
    ):
        return None
    true = [counted(count, " ".join(kind)) for kind, count in groups]
    false = [*true[:which], counted(number, " ".join(planted)), *true[which + 1 :]]
    return f"The image shows {joined(true)}.", f"The image shows {joined(false)}.", error


def _places_told(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    if not (sure := _sure(scene)):
        return None
    icon, where = rng.choice(sure)
    wrong = rng.choice([name for name in PLACES if name != where])
    start = f"There is {article(f'{icon.color} {icon.shape}')} in the"
    return f"{start} {where} of the image.", f"{start} {wrong} of the image.", "position"


def _count_told(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    right = focused(scene)
    wrong = rng.choice([number for number in range(1, MOST_OF_A_KIND + 1) if number != right])
    true, false = (
        f"There {'is' if number == 1 else 'are'} {NUMBERS[number]} {focus_name(scene, number)} in the image."
        for number in (right, wrong)
    )
    return true, false, "count"


def _value_told(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    if scene.kind == "clock":
        names, start = TIMES, "The image shows a clock at"
    else:
        names, start = (
            tuple(map(str, range(LAST_MARK + 1))),
            "The image shows a number line with the arrow at",
        )
    assert scene.value is not None
    right = names[scene.value]
    wrong = rng.choice([name for name in names if name != right])
    return f"{start} {right}.", f"{start} {wrong}.", "value"
