"""Geometry of the report's figures: axes with ticks, and positions in the units of an SVG's view box."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from blipfit.report.numbers import Number

Side = Literal["above", "left", "right"]
WIDTH, SMALL_WIDTH, HEIGHT = 640.0, 440.0, 340.0
LEFT, RIGHT, TOP, BOTTOM = 64.0, 16.0, 16.0, 48.0
"""Margins around the plotting area."""


@dataclass(frozen=True, slots=True)
class Tick:
    """A labeled position on an axis."""

    position: float
    label: str


@dataclass(frozen=True, slots=True)
class Axis:
    """Values from `low` to `high`, drawn between the positions `start` and `end`."""

    label: str
    low: float
    high: float
    start: float
    end: float
    log: bool = False
    whole: bool = False
    """Whether only whole numbers are labeled."""

    def position(self, value: float) -> float:
        """Where a value is drawn; what is outside the axis is drawn at its end."""
        low, high, point = self.low, self.high, min(max(value, self.low), self.high)
        if self.log:
            low, high, point = math.log10(low), math.log10(high), math.log10(point)
        return round(self.start + (point - low) / (high - low) * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[Tick]:
        """Round values with their positions."""
        values = _log_ticks(self.low, self.high) if self.log else []
        if len(values) < 2:
            values = _linear_ticks(self.low, self.high)
        values = [value for value in values if not self.whole or value == int(value)]
        return [Tick(self.position(value), _format_tick(value)) for value in values]


def x_axis(label: str, values: Sequence[float], log: bool = False, whole: bool = False, width: float = WIDTH) -> Axis:
    """A horizontal axis that covers the values; `width` is the figure's."""
    return Axis(label, *_limits(values, log), start=LEFT, end=width - RIGHT, log=log, whole=whole)


def y_axis(label: str, values: Sequence[float]) -> Axis:
    """A vertical axis that covers the values."""
    return Axis(label, *_limits(values, log=False), start=HEIGHT - BOTTOM, end=TOP)


def _limits(values: Sequence[float], log: bool) -> tuple[float, float]:
    """Ends of an axis with a margin on both sides; `values` must not be empty."""
    low, high = min(values), max(values)
    if log:
        ratio = max((high / low) ** 0.05, 1.15)
        return low / ratio, high * ratio
    margin = 0.05 * (high - low) or max(abs(high) * 0.05, 0.5)
    return low - margin, high + margin


def _linear_ticks(low: float, high: float, count: int = 6) -> list[float]:
    raw = (high - low) / count
    magnitude = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 5, 10) if factor * magnitude >= raw)
    return [round(n * step, 10) for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 1000 else (1, 2, 5)
    ticks = [factor * 10.0**decade for decade in decades for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _format_tick(value: float) -> str:
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}".replace("-", "−")


@dataclass(frozen=True, slots=True)
class Point:
    """A marker, with the numbers that it is drawn from."""

    x: float
    y: float
    low: float | None
    """Position of the interval's lower end, if there is an interval."""
    high: float | None
    title: str
    """Text for screen readers and the pointer."""
    kind: str
    """Class name: the marker's form."""
    label: str
    """Text beside the marker; empty for most."""
    numbers: tuple[Number, Number]
    """The values in x and in y."""
    side: Side = "above"
    """Where the label stands."""


@dataclass(frozen=True, slots=True)
class Line:
    """A polyline of one experiment."""

    experiment: str
    """Name of the experiment."""
    title: str
    points: Sequence[tuple[float, float]]
    numbers: Sequence[tuple[Number, Number]]
    is_best: bool

    @property
    def path(self) -> str:
        """The `points` attribute of an SVG polyline."""
        return " ".join(f"{x:g},{y:g}" for x, y in self.points)


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure: points, or lines, over two axes."""

    key: str
    """Unique in a report."""
    title: str
    summary: str
    """What the figure shows, for those who do not see it."""
    x: Axis
    y: Axis
    points: Sequence[Point] = ()
    lines: Sequence[Line] = ()
    reference: float | None = None
    """Position of a horizontal line, for example of chance."""
    reference_label: str = ""

    @property
    def width(self) -> float:
        """Of the view box."""
        return self.x.end + RIGHT
