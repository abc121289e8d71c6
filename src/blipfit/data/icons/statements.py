"""True and false statements about scenes: captions, yes/no questions as in MME, pairs of descriptions."""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from blipfit.data.icons.scene import BOARD, COLORS, LAST_MARK, MAX_PER_KIND, MAX_SHAPES, SHAPES, Icon, Scene
from blipfit.data.icons.scene_words import (
    QUARTERS,
    TIMES,
    add_article,
    count_focus,
    find_quarter,
    format_focus,
    permute,
    pluralize,
    sample_present_and_absent,
    sample_relation,
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
SUBTASKS = ("existence", "count", "position", "color")  # of MME
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
QUERIES = ("Describe this image in detail.", "Describe this image.", "What is in the image?")


def format_count(number: int, noun: str) -> str:
    """Write a number and a noun in words, such as 'one red star' or 'two red stars'."""
    return f"{NUMBERS[number]} {pluralize(noun) if number > 1 else noun}"


def format_list(parts: Sequence[str]) -> str:
    """Join texts as in 'a, b and c'."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _format_side(side: str) -> str:
    """Return 'left of', 'right of', 'above' or 'below'."""
    return f"{side} of" if side in ("left", "right") else side


def _count_names(icons: Sequence[Icon]) -> Counter[str]:
    """Count the icons by name, such as 'red star'."""
    return Counter(f"{icon.color} {icon.shape}" for icon in icons)


def make_captions(scene: Scene) -> list[str]:
    """Make true statements about a scene in lower case, from one about a single icon to one about all icons."""
    if scene.value is not None:
        if scene.kind == "clock":
            return ["a clock", f"a clock showing {TIMES[scene.value]}"]
        return ["a number line", f"a number line with the arrow at {scene.value}"]
    rng = scene.make_rng("captions")
    groups = permute(rng, [format_count(number, name) for name, number in _count_names(scene.icons).items()])
    shapes = Counter(icon.shape for icon in scene.icons)
    colors = Counter(icon.color for icon in scene.icons)
    icon = rng.choice(scene.icons)
    captions = [
        add_article(f"{icon.color} {icon.shape}"),
        add_article(f"{('small', 'big')[icon.span - 1]} {icon.color} {icon.shape}"),
        format_count(len(scene.icons), "shape"),
        format_list(permute(rng, [format_count(number, shape) for shape, number in shapes.items()])),
        format_list(permute(rng, [format_count(number, f"{color} shape") for color, number in colors.items()])),
        groups[0],
    ]
    if quarter := find_quarter(icon):
        captions.append(f"{add_article(f'{icon.color} {icon.shape}')} in the {quarter}")
    if relation := sample_relation(scene, rng):
        first, second, side = relation
        captions.append(f"the {first} is {_format_side(side)} the {second}")
    captions.append(format_list(groups))
    if positions := [f"the {icon.color} {icon.shape} is in the {quarter}" for icon, quarter in _locate_unique(scene)]:
        captions.append(f"{format_list(groups)}; {format_list(permute(rng, positions)[:3])}")
    return list(dict.fromkeys(captions))


def _locate_unique(scene: Scene) -> list[tuple[Icon, str]]:
    """Return the icons with a unique name that lie in one quarter of the picture, with that quarter."""
    counts = _count_names(scene.icons)
    positions = [(icon, find_quarter(icon)) for icon in scene.icons if counts[f"{icon.color} {icon.shape}"] == 1]
    return [(icon, quarter) for icon, quarter in positions if quarter]


@dataclass(frozen=True, slots=True)
class YesNoPair:
    """Two questions about one picture in the wording of MME."""

    subtask: str
    """A name in `SUBTASKS`."""
    yes: str
    """The question whose answer is yes."""
    no: str
    """The question whose answer is no."""


def _add_instruction(question: str) -> str:
    return f"{question} Please answer yes or no."


def _ask_total(number: int, singular: str, plural: str) -> str:
    """Ask whether the picture contains that number of things, in the wording of MME."""
    if number == 1:
        return _add_instruction(f"Is there only one {singular} in the image?")
    return _add_instruction(f"Are there a total of {NUMBERS[number]} {plural} in the image?")


def _make_count_pair(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    if scene.plan == "kind":
        right, maximum = count_focus(scene), MAX_PER_KIND
        nouns = (format_focus(scene, 1), format_focus(scene, 2))
    elif scene.plan == "total":
        right, maximum, nouns = len(scene.icons), MAX_SHAPES, ("shape", "shapes")
    else:
        return None
    wrong = rng.choice([number for number in range(1, maximum + 1) if number != right])
    return _ask_total(right, *nouns), _ask_total(wrong, *nouns)


def _make_existence_pair(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    names = sample_present_and_absent(scene, rng, "shape")
    if names is None:
        return None
    yes, no = (_add_instruction(f"Is there {add_article(name)} in this image?") for name in names)
    return yes, no


def _make_color_pair(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Ask for a shape in its color and in a color that no icon of that shape has.

    In half of the cases where that is possible, another icon of the picture has the second color.
    """
    icon = rng.choice(scene.icons)
    shape_colors = {other.color for other in scene.icons if other.shape == icon.shape}
    wrong_colors = [color for color in COLORS if color not in shape_colors]
    present_colors = [color for color in wrong_colors if any(other.color == color for other in scene.icons)]
    if not wrong_colors:
        return None
    wrong = rng.choice(present_colors if present_colors and rng.random() < 0.5 else wrong_colors)
    yes, no = (
        _add_instruction(f"Is there {add_article(f'{color} {icon.shape}')} in the image?")
        for color in (icon.color, wrong)
    )
    return yes, no


def _make_position_pair(scene: Scene, rng: random.Random) -> tuple[str, str] | None:
    """Ask on which side of one icon another is, or in which half of the picture the only icon of its shape is."""
    if scene.plan == "pattern":  # patterns always start at the left: the text alone would reveal the answer
        return None
    if rng.random() < 0.5 and (relation := sample_relation(scene, rng)):
        first, second, side = relation
        return _ask_relation(first, second, side), _ask_relation(first, second, OPPOSITE[side])
    icon = rng.choice(scene.icons)
    half = BOARD // 2
    vertical = rng.random() < 0.5
    start = icon.row if vertical else icon.col
    if [other.shape for other in scene.icons].count(icon.shape) > 1 or start < half < start + icon.span:
        return None
    sides = ("top", "bottom") if vertical else ("left", "right")
    ordered = sides if start < half else sides[::-1]
    yes, no = (_add_instruction(f"Is the {icon.shape} on the {side} side of the picture?") for side in ordered)
    return yes, no


def _ask_relation(first: str, second: str, side: str) -> str:
    relation = f"on the {side} of" if side in ("left", "right") else side
    return _add_instruction(f"Is the {first} {relation} the {second}?")


_PAIR_MAKERS = {
    "existence": _make_existence_pair,
    "count": _make_count_pair,
    "position": _make_position_pair,
    "color": _make_color_pair,
}


def make_yes_no_pairs(scene: Scene) -> list[YesNoPair]:
    """Make at most one pair of yes/no questions per subtask of MME; none for clocks and number lines."""
    if not scene.icons:
        return []
    pairs = [(subtask, _PAIR_MAKERS[subtask](scene, scene.make_rng(f"mme/{subtask}"))) for subtask in SUBTASKS]
    return [YesNoPair(subtask, *pair) for subtask, pair in pairs if pair is not None]


@dataclass(frozen=True, slots=True)
class Preference:
    """A request with two descriptions of the picture: a true one, and the same one with an error."""

    query: str
    good: str
    """The true description."""
    bad: str
    """The description with the error."""
    error: str
    """What is wrong in it: color, shape, position, count or value."""


Descriptions = tuple[str, str, str]  # true description, false description, kind of error


def make_preference(scene: Scene) -> Preference | None:
    """Make two descriptions of a scene that differ in one word or number; None if the scene allows no fair pair.

    A pair is fair if both descriptions are equally likely, so that the text does not reveal the false one. Therefore
    only what the plan sampled uniformly is replaced, and only by what the plan could have sampled.
    """
    rng = scene.make_rng("preference")
    describers = {
        "total": (_describe_kinds,),
        "few": (_describe_kinds, _describe_position),
        "line": (_describe_kinds,),
        "kind": (_describe_count,),
        "clock": (_describe_value,),
        "scale": (_describe_value,),
    }.get(scene.plan, ())
    descriptions = rng.choice(describers)(scene, rng) if describers else None
    return descriptions and Preference(rng.choice(QUERIES), *descriptions)


def _describe_kinds(scene: Scene, rng: random.Random) -> Descriptions | None:
    """List all icons, with one color or shape replaced in the false description."""
    groups = list(Counter((icon.color, icon.shape) for icon in scene.icons).items())
    rng.shuffle(groups)
    index = rng.randrange(len(groups))
    (color, shape), number = groups[index]
    error = rng.choice(("color", "shape"))
    if error == "color":
        wrong = (rng.choice([name for name in COLORS if name != color]), shape)
    else:
        wrong = (color, rng.choice([name for name in SHAPES if name != shape]))
    others = [kind for kind, _ in groups if kind != (color, shape)]
    # The plan could not have sampled a kind that is there already, nor, except for "total", a repeated color or shape.
    repeated = any(name == other for kind in others for name, other in zip(wrong, kind, strict=True))
    if wrong in others or (scene.plan != "total" and repeated):
        return None
    true = [format_count(count, " ".join(kind)) for kind, count in groups]
    false = [*true[:index], format_count(number, " ".join(wrong)), *true[index + 1 :]]
    return f"The image shows {format_list(true)}.", f"The image shows {format_list(false)}.", error


def _describe_position(scene: Scene, rng: random.Random) -> Descriptions | None:
    """Name the quarter of one icon."""
    if not (positions := _locate_unique(scene)):
        return None
    icon, quarter = rng.choice(positions)
    wrong = rng.choice([name for name in QUARTERS if name != quarter])
    start = f"There is {add_article(f'{icon.color} {icon.shape}')} in the"
    return f"{start} {quarter} of the image.", f"{start} {wrong} of the image.", "position"


def _describe_count(scene: Scene, rng: random.Random) -> Descriptions | None:
    """Describe how many icons of the kind that the scene is about there are: once right, once with a wrong number."""
    right = count_focus(scene)
    wrong = rng.choice([number for number in range(1, MAX_PER_KIND + 1) if number != right])
    true, false = (
        f"There {'is' if number == 1 else 'are'} {NUMBERS[number]} {format_focus(scene, number)} in the image."
        for number in (right, wrong)
    )
    return true, false, "count"


def _describe_value(scene: Scene, rng: random.Random) -> Descriptions | None:
    """Name the time on a clock or the number at the pointer of a number line."""
    if scene.kind == "clock":
        names, start = TIMES, "The image shows a clock at"
    else:
        names = tuple(map(str, range(LAST_MARK + 1)))
        start = "The image shows a number line with the arrow at"
    assert scene.value is not None
    right = names[scene.value]
    wrong = rng.choice([name for name in names if name != right])
    return f"{start} {right}.", f"{start} {wrong}.", "value"
