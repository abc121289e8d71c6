"""Skills: the kinds of questions about scenes, with one function per skill.

A skill function returns a draft: the question, its answer and the pool of answers that are equally likely for a
reader of the text. The wrong choices are sampled from that pool, so neither the question nor the choices reveal the
answer. It returns None if the scene does not allow the question.
"""

import random
from collections.abc import Callable, Iterable
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
    sample_unique_name,
)

ORDINALS = ("first", "second", "third", "fourth")
# From an icon to the neighboring cell on that side: rows down, columns to the right.
NEIGHBORS = {"left of": (0, -1), "right of": (0, 1), "above": (-1, 0), "below": (1, 0)}

Draft = tuple[str, str, tuple[str, ...]]  # question, answer, pool of answers (with the right one)


def _sample_pool(rng: random.Random, present: Iterable[str], pool: tuple[str, ...]) -> tuple[str, ...]:
    """Return, in half of the cases, only the names in the picture, so that being present does not mark the answer."""
    names = set(present)
    present_pool = tuple(name for name in pool if name in names)
    return present_pool if len(present_pool) > 1 and rng.random() < 0.5 else pool


def _focus_noun(scene: Scene) -> str:
    """Return whether the focus of a scene names shapes or colors: 'shape' or 'color'."""
    return "shape" if scene.focus[0] in SHAPES else "color"


def _ask_count_all(scene: Scene, rng: random.Random) -> Draft | None:
    numbers = tuple(str(number) for number in range(1, MAX_SHAPES + 1))
    return "How many shapes are there?", str(len(scene.icons)), numbers


def _ask_count_kind(scene: Scene, rng: random.Random) -> Draft | None:
    numbers = tuple(str(number) for number in range(1, MAX_PER_KIND + 1))
    return f"How many {format_focus(scene, 2)} are there?", str(count_focus(scene)), numbers


def _ask_color(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the color of all icons of one shape."""
    shape = rng.choice(scene.icons).shape
    colors = [icon.color for icon in scene.icons if icon.shape == shape]
    if len(set(colors)) > 1:
        return None
    question = f"What color is the {shape}?" if len(colors) == 1 else f"What color are the {pluralize(shape)}?"
    return question, colors[0], _sample_pool(rng, [icon.color for icon in scene.icons], COLORS)


def _ask_shape(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the shape of all icons of one color."""
    color = rng.choice(scene.icons).color
    shapes = [icon.shape for icon in scene.icons if icon.color == color]
    if len(set(shapes)) > 1:
        return None
    pool = _sample_pool(rng, [icon.shape for icon in scene.icons], SHAPES)
    if len(shapes) == 1:
        return f"Which shape is {color}?", shapes[0], pool
    return f"Which shapes are {color}?", pluralize(shapes[0]), tuple(pluralize(shape) for shape in pool)


def _ask_exists(scene: Scene, rng: random.Random) -> Draft | None:
    names = sample_present_and_absent(scene, rng, rng.choice(("shape", "color", "both")))
    if names is None:
        return None
    answer = rng.choice(("yes", "no"))
    return f"Is there {add_article(names[answer == 'no'])}?", answer, ("yes", "no")


def _ask_relation(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask on which side of one icon another is."""
    relation = sample_relation(scene, rng)
    if relation is None:
        return None
    first, second, side = relation
    if side in ("left", "right"):
        return f"Is the {first} left or right of the {second}?", side, ("left", "right")
    return f"Is the {first} above or below the {second}?", side, ("above", "below")


def _ask_bigger(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask which of a big and a small icon is bigger or smaller."""
    big = [icon for icon in scene.icons if icon.span == 2]
    small = [icon for icon in scene.icons if icon.span == 1]
    if not big or not small:
        return None
    shapes = rng.choice(big).shape, rng.choice(small).shape
    if any([icon.shape for icon in scene.icons].count(shape) > 1 for shape in shapes):
        return None
    answer_index = rng.randrange(2)
    first, second = permute(rng, shapes)
    question = f"Which shape is {('bigger', 'smaller')[answer_index]}, the {first} or the {second}?"
    return question, shapes[answer_index], shapes


def _ask_size(scene: Scene, rng: random.Random) -> Draft | None:
    if len({icon.span for icon in scene.icons}) < 2:
        return None
    span = rng.choice((1, 2))
    icon = rng.choice([icon for icon in scene.icons if icon.span == span])
    name = sample_unique_name(rng, icon, scene.icons)
    if name is None:
        return None
    return f"Is the {name} big or small?", ("small", "big")[span - 1], ("big", "small")


def _ask_where(scene: Scene, rng: random.Random) -> Draft | None:
    icon = rng.choice(scene.icons)
    name, quarter = sample_unique_name(rng, icon, scene.icons), find_quarter(icon)
    return (f"Where is the {name}?", quarter, QUARTERS) if name and quarter else None


def _sample_single_in_quarter(scene: Scene, rng: random.Random) -> tuple[Icon, str] | None:
    """Sample a quarter of the picture and return its icon, if it holds exactly one and that one completely."""
    quarter = rng.choice(QUARTERS)
    half = BOARD // 2
    top, left = half * (quarter[0] == "b"), half * quarter.endswith("right")
    cells = {(top + down, left + right) for down in range(half) for right in range(half)}
    icons = [icon for icon in scene.icons if icon.cells & cells]
    return (icons[0], quarter) if len(icons) == 1 and find_quarter(icons[0]) == quarter else None


def _ask_shape_at(scene: Scene, rng: random.Random) -> Draft | None:
    pair = _sample_single_in_quarter(scene, rng)
    if pair is None:
        return None
    icon, quarter = pair
    pool = _sample_pool(rng, [other.shape for other in scene.icons], SHAPES)
    return f"Which shape is in the {quarter}?", icon.shape, pool


def _ask_color_at(scene: Scene, rng: random.Random) -> Draft | None:
    pair = _sample_single_in_quarter(scene, rng)
    if pair is None:
        return None
    icon, quarter = pair
    pool = _sample_pool(rng, [other.color for other in scene.icons], COLORS)
    return f"What color is the shape in the {quarter}?", icon.color, pool


def _ask_neighbor(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the shape in the cell beside, above or below an icon; None if there is no unambiguous such question."""
    icon = rng.choice(scene.icons)
    side, (down, right) = rng.choice(list(NEIGHBORS.items()))
    neighbor_cell = (icon.row + down, icon.col + right)
    neighbors = [other for other in scene.icons if other.cells == {neighbor_cell}]
    name = sample_unique_name(rng, icon, scene.icons)
    if icon.span != 1 or not neighbors or name is None or neighbors[0].shape == icon.shape:
        return None
    pool = tuple(shape for shape in SHAPES if shape != icon.shape)
    return f"Which shape is just {side} the {name}?", neighbors[0].shape, pool


def _ask_time(scene: Scene, rng: random.Random) -> Draft | None:
    assert scene.value is not None
    return "What time does the clock show?", TIMES[scene.value], TIMES


def _ask_scale(scene: Scene, rng: random.Random) -> Draft | None:
    return "What number is the arrow at?", str(scene.value), tuple(str(mark) for mark in range(LAST_MARK + 1))


def _ask_end(scene: Scene, rng: random.Random) -> Draft | None:
    side = rng.choice(("left", "right"))
    answer = scene.icons[0 if side == "left" else -1].shape
    return f"Which shape is at the {side} end?", answer, tuple(icon.shape for icon in scene.icons)


def _ask_side(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask how many icons are on one side of an icon in a row, zero to three."""
    number, side = rng.randrange(len(scene.icons)), rng.choice(("left", "right"))
    icon = scene.icons[number if side == "left" else -1 - number]
    name = sample_unique_name(rng, icon, scene.icons)
    pool = tuple(map(str, range(len(scene.icons))))
    return None if name is None else (f"How many shapes are {side} of the {name}?", str(number), pool)


def _ask_flank(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the icon in a row that has a certain number of icons on one side."""
    number, side = rng.randrange(len(scene.icons)), rng.choice(("left", "right"))
    icon = scene.icons[number if side == "left" else -1 - number]
    question = f"Which shape has {number} {'shape' if number == 1 else 'shapes'} on its {side}?"
    return question, icon.shape, tuple(other.shape for other in scene.icons)


def _ask_times(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the only shape or color that occurs a certain number of times, one to five."""
    noun, pool = rng.choice((("shape", SHAPES), ("color", COLORS)))
    present = [icon.shape if noun == "shape" else icon.color for icon in scene.icons]
    counts = {name: present.count(name) for name in present}
    candidates = [
        name for name, count in counts.items() if count <= MAX_PER_KIND and list(counts.values()).count(count) == 1
    ]
    if not candidates:
        return None
    name = rng.choice(candidates)
    question = f"Which {noun} is there {counts[name]} {'time' if counts[name] == 1 else 'times'}?"
    return question, name, _sample_pool(rng, present, pool)


def _ask_mark(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask for the shape or color left of or above the question mark of a pattern, if an icon is in that cell."""
    assert scene.question_mark_cell is not None
    noun = _focus_noun(scene)
    row, col = scene.question_mark_cell
    side = rng.choice(("left of", "above"))
    down, right = NEIGHBORS[side]
    neighbors = [icon for icon in scene.icons if (icon.row, icon.col) == (row + down, col + right)]
    if not neighbors:
        return None
    answer = neighbors[0].shape if noun == "shape" else neighbors[0].color
    return f"Which {noun} is just {side} the question mark?", answer, scene.focus


def _ask_all(scene: Scene, rng: random.Random) -> Draft | None:
    """Ask "are all shapes red?"; only for scenes whose icons all share the shape or the color, but not both."""
    shapes, colors = [icon.shape for icon in scene.icons], [icon.color for icon in scene.icons]
    same_shape, same_color = len(set(shapes)) == 1, len(set(colors)) == 1
    if same_shape == same_color:
        return None
    shared_name, mixed_names = (shapes[0], colors) if same_shape else (colors[0], shapes)
    answer = rng.choice(("yes", "no"))
    name = shared_name if answer == "yes" else max(sorted(set(mixed_names)), key=mixed_names.count)
    return f"Are all shapes {pluralize(name) if name in SHAPES else name}?", answer, ("yes", "no")


def _ask_compare(scene: Scene, rng: random.Random) -> Draft | None:
    by_shape = _focus_noun(scene) == "shape"
    present = [icon.shape if by_shape else icon.color for icon in scene.icons]
    more, fewer = sorted(scene.focus, key=present.count, reverse=True)
    first, second = permute(rng, scene.focus)
    if by_shape:
        pool = (pluralize(more), pluralize(fewer))
        return f"Are there more {pluralize(first)} or {pluralize(second)}?", pool[0], pool
    return f"Are there more {first} or {second} shapes?", more, (more, fewer)


def _ask_pattern(scene: Scene, rng: random.Random) -> Draft | None:
    return f"Which {_focus_noun(scene)} comes next?", scene.focus[0], scene.focus


def _ask_ordinal(scene: Scene, rng: random.Random) -> Draft | None:
    position = rng.randrange(len(scene.icons))
    side = rng.choice(("left", "right"))
    icon = scene.icons[position if side == "left" else -1 - position]
    shapes = tuple(other.shape for other in scene.icons)
    return f"Which shape is {ORDINALS[position]} from the {side}?", icon.shape, shapes


def _ask_odd(scene: Scene, rng: random.Random) -> Draft | None:
    return f"Which {_focus_noun(scene)} is different from the others?", scene.focus[0], scene.focus


@dataclass(frozen=True, slots=True)
class Skill:
    """One kind of question."""

    ask: Callable[[Scene, random.Random], Draft | None]
    """Makes a draft of a question about a scene, or returns None if the scene does not allow one."""
    plans: tuple[str, ...]
    """The plans whose scenes it can ask about, keys of `PLANS`."""
    held_out: bool = False
    """Whether the skill is kept out of pre-training."""


_SEVERAL_ICONS = ("total", "kind", "few", "grid", "line")
SKILLS: dict[str, Skill] = {
    "count_all": Skill(_ask_count_all, ("total",)),
    "count_kind": Skill(_ask_count_kind, ("kind",)),
    "color": Skill(_ask_color, (*_SEVERAL_ICONS, "pair", "odd")),
    "shape": Skill(_ask_shape, (*_SEVERAL_ICONS, "pair", "odd")),
    "exists": Skill(_ask_exists, (*_SEVERAL_ICONS, "pair", "odd", "pattern")),
    "relation": Skill(_ask_relation, ("few", "total", "kind", "line")),
    "bigger": Skill(_ask_bigger, ("few", "total")),
    "size": Skill(_ask_size, ("few", "total")),
    "where": Skill(_ask_where, ("few", "total", "kind")),
    "shape_at": Skill(_ask_shape_at, ("few", "total", "kind")),
    "color_at": Skill(_ask_color_at, ("few", "total", "kind")),
    "beside": Skill(_ask_neighbor, ("line", "grid", "few")),
    "time": Skill(_ask_time, ("clock",)),
    "scale": Skill(_ask_scale, ("scale",)),
    "end": Skill(_ask_end, ("line",)),
    "side": Skill(_ask_side, ("line",)),
    "flank": Skill(_ask_flank, ("line",)),
    "times": Skill(_ask_times, ("total", "kind", "grid", "pair", "odd")),
    "mark": Skill(_ask_mark, ("pattern",)),
    "all": Skill(_ask_all, ("odd", "pattern")),
    "compare": Skill(_ask_compare, ("pair",), held_out=True),
    "pattern": Skill(_ask_pattern, ("pattern",), held_out=True),
    "ordinal": Skill(_ask_ordinal, ("line",), held_out=True),
    "odd": Skill(_ask_odd, ("odd",), held_out=True),
}
PRETRAINED = tuple(name for name, skill in SKILLS.items() if not skill.held_out)  # skills used in pre-training
HELD_OUT = tuple(name for name, skill in SKILLS.items() if skill.held_out)
