"""Facts about a scene and the words for them, shared by questions, captions and descriptions."""

import random
from collections.abc import Iterable
from typing import TypeVar

from blipfit.data.icons.scene import BOARD, COLORS, SHAPES, Icon, Scene

QUARTERS = ("top left", "top right", "bottom left", "bottom right")
TIMES = tuple(f"{half // 2 or 12}:{half % 2 * 30:02d}" for half in range(24))  # by half hours since twelve

Item = TypeVar("Item")


def pluralize(noun: str) -> str:
    """Return the plural of a noun, such as 'crosses' or 'stars'."""
    return noun + ("es" if noun.endswith("s") else "s")


def add_article(name: str) -> str:
    """Put 'a' or 'an' before a name, as in 'a star' or 'an orange star'."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def permute(rng: random.Random, items: Iterable[Item]) -> list[Item]:
    """Return the items in a random order."""
    sequence = list(items)
    return rng.sample(sequence, len(sequence))


def sample_unique_name(rng: random.Random, icon: Icon, icons: Iterable[Icon]) -> str | None:
    """Sample a name that fits `icon` and no other of the icons.

    Names have the forms 'star', 'red shape' and 'red star'. The result is None if every name fits another icon too.
    """
    other_icons = [other for other in icons if other is not icon]
    names = []
    if all(other.shape != icon.shape for other in other_icons):
        names.append(icon.shape)
    if all(other.color != icon.color for other in other_icons):
        names.append(f"{icon.color} shape")
    if all((other.shape, other.color) != (icon.shape, icon.color) for other in other_icons):
        names.append(f"{icon.color} {icon.shape}")
    return rng.choice(names) if names else None


def find_quarter(icon: Icon) -> str | None:
    """Return the quarter of the picture that contains the whole icon, or None if the icon lies in several."""
    half = BOARD // 2
    if any(start < half < start + icon.span for start in (icon.row, icon.col)):
        return None
    return QUARTERS[2 * (icon.row >= half) + (icon.col >= half)]


def count_focus(scene: Scene) -> int:
    """Count the icons that have the shape and color in the focus of a scene of the plan 'kind'."""
    shape, color = scene.focus
    return sum(icon.shape in (shape or icon.shape,) and icon.color in (color or icon.color,) for icon in scene.icons)


def format_focus(scene: Scene, number: int) -> str:
    """Name the focus of a scene of the plan 'kind', such as 'red star' for number 1, 'stars' or 'red shapes' for 2."""
    shape, color = scene.focus
    noun = shape or "shape"
    return f"{color} {pluralize(noun) if number != 1 else noun}".strip()


def sample_present_and_absent(scene: Scene, rng: random.Random, by: str) -> tuple[str, str] | None:
    """Sample a name that fits an icon in the picture, and a name of the same form that fits none.

    `by` is the form: 'shape' ('star'), 'color' ('red shape') or 'both' ('red star'). With 'both', at least two of
    three absent names are near misses: an icon has their shape or their color. The result is None if the picture
    contains all shapes or all colors.
    """
    shapes = {icon.shape for icon in scene.icons}
    colors = {icon.color for icon in scene.icons}
    icon = rng.choice(scene.icons)
    if by == "shape":
        absent = [shape for shape in SHAPES if shape not in shapes]
        return (icon.shape, rng.choice(absent)) if absent else None
    if by == "color":
        absent = [color for color in COLORS if color not in colors]
        return (f"{icon.color} shape", f"{rng.choice(absent)} shape") if absent else None
    pairs = {(icon.color, icon.shape) for icon in scene.icons}
    missing = [(color, shape) for color in COLORS for shape in SHAPES if (color, shape) not in pairs]
    near_misses = [(color, shape) for color, shape in missing if (color in colors) or (shape in shapes)]
    return f"{icon.color} {icon.shape}", " ".join(rng.choice(near_misses if rng.random() < 2 / 3 else missing))


def compare_positions(first: Icon, second: Icon, vertical: bool) -> str | None:
    """Return on which side of `second` the icon `first` is.

    The sides are 'left' and 'right', or 'above' and 'below' if `vertical`. The result is None if the two icons share
    a column, or a row if `vertical`.
    """
    first_start, second_start = (first.row, second.row) if vertical else (first.col, second.col)
    if first_start + first.span <= second_start:
        return "above" if vertical else "left"
    if second_start + second.span <= first_start:
        return "below" if vertical else "right"
    return None


def sample_relation(scene: Scene, rng: random.Random) -> tuple[str, str, str] | None:
    """Sample two icons: their unique names, and the side of the second on which the first is.

    The result is None if the scene has fewer than two icons, or if the two sampled ones have no unique names or no
    clear order along the sampled axis.
    """
    if len(scene.icons) < 2:
        return None
    first, second = rng.sample(scene.icons, 2)
    side = compare_positions(first, second, rng.random() < 0.5)
    first_name = sample_unique_name(rng, first, scene.icons)
    second_name = sample_unique_name(rng, second, scene.icons)
    if side is None or first_name is None or second_name is None:
        return None
    return first_name, second_name, side
