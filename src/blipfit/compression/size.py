"""How small: the sizes of a Q-Former, what of them is possible, and the configuration they make."""

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

from blipfit.errors import UserError


@dataclass(frozen=True, slots=True)
class Size:
    """The dimensions of a Q-Former that shrinking can lower."""

    hidden: int
    heads: int
    intermediate: int
    layers: int
    queries: int
    cross_every: int

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    @property
    def crossings(self) -> int:
        """Layers with cross-attention: 0, cross_every, 2 · cross_every, …"""
        return -(-self.layers // self.cross_every)


OPTIONS = {
    "hidden": "--hidden-size",
    "heads": "--heads",
    "intermediate": "--intermediate-size",
    "layers": "--layers",
    "queries": "--queries",
    "cross_every": "--cross-every",
}


def of(config: Any) -> Size:
    """The size of a model's Q-Former."""
    c = config.qformer_config
    return Size(
        c.hidden_size,
        c.num_attention_heads,
        c.intermediate_size,
        c.num_hidden_layers,
        config.num_query_tokens,
        c.cross_attention_frequency,
    )


def wanted(config: Any, **sizes: int | None) -> Size:
    """The original's size with these fields lowered; UserError where weights cannot be inherited that way."""
    there = of(config)
    size = replace(there, **{name: value for name, value in sizes.items() if value is not None})
    for field in fields(Size):
        option, value, most = OPTIONS[field.name], getattr(size, field.name), getattr(there, field.name)
        if value < 1:
            raise UserError(f"{option} {value} is too small; give 1 or more")
        if value > most and field.name != "cross_every":
            raise UserError(f"{option} {value} is larger than the original's {most}, and shrinking invents no weights")
    if size.hidden % size.heads:
        fitting = [n for n in range(1, there.heads + 1) if size.hidden % n == 0]
        raise UserError(
            f"--hidden-size {size.hidden} is not divisible by --heads {size.heads}; give --heads of "
            f"{', '.join(map(str, fitting))}"
        )
    if size.head_width > there.head_width:
        least = next(n for n in range(size.heads, size.hidden + 1) if _fits(size.hidden, n, there.head_width))
        mend = f"give --heads {least}" if least <= there.heads else "give another --hidden-size"
        raise UserError(f"heads of {size.head_width} channels are wider than the original's {there.head_width}; {mend}")
    _check_crossings(there, size)
    return size


def configured(config: Any, size: Size) -> Any:
    """A copy of a model's configuration with this size."""
    small = copy.deepcopy(config)
    small.num_query_tokens = size.queries
    for name, value in qformer_fields(size).items():
        setattr(small.qformer_config, name, value)
    return small


def qformer_fields(size: Size) -> dict[str, int]:
    """The fields of `qformer_config` that say this size."""
    return {
        "hidden_size": size.hidden,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "cross_attention_frequency": size.cross_every,
    }


def _fits(hidden: int, heads: int, most: int) -> bool:
    return hidden % heads == 0 and hidden // heads <= most


def _check_crossings(there: Size, size: Size) -> None:
    """A crossing layer can only come from one, and the layers between two of them from layers between."""
    try:
        sources(there, size, [0.0] * there.layers, [0.0] * there.layers)
    except ValueError:
        raise UserError(
            f"{size.layers} layers with cross-attention in every {_ordinal(size.cross_every)} cannot be chosen from "
            f"{there.layers} with it in every {_ordinal(there.cross_every)}; lower --layers or raise --cross-every"
        ) from None


def sources(there: Size, size: Size, main: list[float], cross: list[float]) -> tuple[int, ...]:
    """The original's layers that a smaller model keeps, in order: those of the highest summed worth.

    `main` is a layer's worth without its cross-attention, `cross` that of its cross-attention. A layer at a place
    with cross-attention must have had one; elsewhere a cross-attention is lost. ValueError where there is no choice.
    """
    # best[source] = (worth, path) of the best choice for the places so far that ends in this source
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for place in range(size.layers):
        crossing = place % size.cross_every == 0
        coming: dict[int, tuple[float, tuple[int, ...]]] = {}
        for source in range(there.layers):
            if crossing and source % there.cross_every:
                continue
            before = [found for last, found in best.items() if last < source]
            if before:
                worth, path = max(before, key=lambda found: found[0])
                coming[source] = (worth + main[source] + (cross[source] if crossing else 0.0), (*path, source))
        best = coming
    if not best:
        raise ValueError("no such choice of layers")
    return max(best.values(), key=lambda found: found[0])[1]


def _ordinal(number: int) -> str:
    return {1: "layer", 2: "second"}.get(number, f"{number}th")
