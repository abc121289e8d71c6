"""Numbers of a report, each with the place in a result file that it comes from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blipfit.report import terminal


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a result file, as it is printed."""

    value: float
    """As it is in the file."""
    source: str
    """`FILE#/JSON/POINTER`; in a `.jsonl` file the first part of the pointer is the line, counted from 0."""
    digits: int = 1
    """Decimal places that are printed."""
    factor: float = 1
    """Printed value divided by `value`, for example 100 for a share in percent."""
    signed: bool = False
    """Whether a plus is printed before a positive number."""
    subtrahend: "Number | None" = None
    """If given, the number is a difference: `value` minus this."""
    duration: bool = False
    """Whether it is a number of seconds that is printed as a duration."""

    @property
    def shown_value(self) -> float:
        """The value that is printed, before rounding."""
        return (self.value - (self.subtrahend.value if self.subtrahend else 0)) * self.factor

    @property
    def text(self) -> str:
        """The printed number."""
        if self.duration:
            return terminal.format_duration(self.value)
        rounded = round(self.shown_value, self.digits) + 0.0  # no minus before 0
        sign = "+" if self.signed else ""
        return format(rounded, f"{sign},.{self.digits}f").replace("-", "−")

    def minus(self, other: "Number") -> "Number":
        """The difference of two numbers, printed with its sign."""
        return replace(self, subtrahend=other, signed=True)


@dataclass(frozen=True, slots=True)
class Record:
    """The content of a result file, read without assuming that anything in it is there."""

    file: str
    """Its path, as it is named in the report."""
    content: Any
    prefix: str = ""
    """JSON Pointer of `content` in the file."""

    def get(self, *path: str | int) -> Any:
        """The value at a path of keys and list indices, or None."""
        value = self.content
        for key in path:
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
                value = value[key]
            else:
                return None
        return value

    def mapping(self, *path: str | int) -> Mapping[str, Any]:
        """The object at a path, empty if there is none."""
        value = self.get(*path)
        return value if isinstance(value, Mapping) else {}

    def text(self, *path: str | int) -> str:
        """The value at a path as a text, empty if there is none."""
        value = self.get(*path)
        return "" if value is None else str(value)

    def number(self, *path: str | int, digits: int = 1, factor: float = 1, duration: bool = False) -> Number | None:
        """The finite number at a path, or None."""
        value = self.get(*path)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return Number(value, self.source(*path), digits, factor, duration=duration)

    def interval(self, *path: str | int, factor: float = 1) -> tuple[Number, Number] | None:
        """The two ends of an interval at a path, or None if one of them is missing."""
        low = self.number(*path, 0, factor=factor)
        high = self.number(*path, 1, factor=factor)
        return (low, high) if low and high else None

    def source(self, *path: str | int) -> str:
        """`FILE#/JSON/POINTER` (RFC 6901) of a path."""
        parts = (str(key).replace("~", "~0").replace("/", "~1") for key in path)
        return f"{self.file}#{self.prefix}" + "".join(f"/{part}" for part in parts)
