"""The size of a Q-Former: which smaller sizes are possible, and the configuration of a size."""

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
    """Layers 0, cross_every, 2 · cross_every, … have cross-attention."""

    @classmethod
    def from_config(cls, config: Any) -> "Size":
        """Read the size of the Q-Former from an `InstructBlipConfig`."""
        qformer = config.qformer_config
        return cls(
            hidden=qformer.hidden_size,
            heads=qformer.num_attention_heads,
            intermediate=qformer.intermediate_size,
            layers=qformer.num_hidden_layers,
            queries=config.num_query_tokens,
            cross_every=qformer.cross_attention_frequency,
        )

    @property
    def head_width(self) -> int:
        """Channels of one attention head."""
        return self.hidden // self.heads

    @property
    def qformer_fields(self) -> dict[str, int]:
        """This size as fields of `InstructBlipQFormerConfig`; the number of query tokens is not among them."""
        return {
            "hidden_size": self.hidden,
            "num_attention_heads": self.heads,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "cross_attention_frequency": self.cross_every,
        }


COMMAND_OPTIONS = {
    "hidden": "--hidden-size",
    "heads": "--heads",
    "intermediate": "--intermediate-size",
    "layers": "--layers",
    "queries": "--queries",
    "cross_every": "--cross-every",
}
"""Field of `Size` → option of `blipfit shrink`."""


def reduce_size(config: Any, **dimensions: int | None) -> Size:
    """Return the size of a model's Q-Former with some of its dimensions lowered.

    `dimensions`: new values of fields of `Size`; None leaves a field as it is. Raises UserError if a Q-Former of that
    size cannot inherit the model's weights.
    """
    original = Size.from_config(config)
    size = replace(original, **{name: value for name, value in dimensions.items() if value is not None})
    for field in fields(Size):
        option, value, maximum = COMMAND_OPTIONS[field.name], getattr(size, field.name), getattr(original, field.name)
        if value < 1:
            raise UserError(f"{option} {value} is too small; give 1 or more")
        if value > maximum and field.name != "cross_every":
            raise UserError(f"{option} {value} is larger than the original's {maximum}; shrinking adds no weights")
    if size.hidden % size.heads:
        divisors = [heads for heads in range(1, original.heads + 1) if size.hidden % heads == 0]
        raise UserError(
            f"--hidden-size {size.hidden} is not divisible by --heads {size.heads}; "
            f"give --heads of {', '.join(map(str, divisors))}"
        )
    if size.head_width > original.head_width:
        candidates = range(size.heads, size.hidden + 1)
        heads = next(n for n in candidates if size.hidden % n == 0 and size.hidden // n <= original.head_width)
        fix = f"give --heads {heads}" if heads <= original.heads else "give another --hidden-size"
        raise UserError(
            f"heads of {size.head_width} channels are wider than the original's {original.head_width}; {fix}"
        )
    _check_layers(original, size)
    return size


def resize_config(config: Any, size: Size) -> Any:
    """Return a copy of an `InstructBlipConfig` with a Q-Former of this size."""
    resized = copy.deepcopy(config)
    resized.num_query_tokens = size.queries
    for name, value in size.qformer_fields.items():
        setattr(resized.qformer_config, name, value)
    return resized


def _check_layers(original: Size, size: Size) -> None:
    """Raise UserError if the original has too few layers with cross-attention for this size."""
    try:
        select_layers(original, size, [0.0] * original.layers, [0.0] * original.layers)
    except ValueError:
        raise UserError(
            f"{size.layers} layers with cross-attention {_describe_interval(size.cross_every)} cannot be selected from "
            f"{original.layers} layers with it {_describe_interval(original.cross_every)}; "
            "lower --layers or raise --cross-every"
        ) from None


def select_layers(
    original: Size, size: Size, layer_importance: list[float], cross_importance: list[float]
) -> tuple[int, ...]:
    """Return the indices of the original's layers that a smaller model keeps: those of the highest total importance.

    `layer_importance`: one value per layer, its cross-attention excluded. `cross_importance`: one value per layer, of
    its cross-attention. A layer of the smaller model that has cross-attention must inherit from a layer that has it;
    a layer without drops the cross-attention of the layer that it inherits from. The indices are ascending. Raises
    ValueError if no selection fulfills this.
    """
    # Dynamic programming: last selected layer → (importance, layers) of the best selection that ends in it.
    best: dict[int, tuple[float, tuple[int, ...]]] = {-1: (0.0, ())}
    for position in range(size.layers):
        has_cross = position % size.cross_every == 0
        extended: dict[int, tuple[float, tuple[int, ...]]] = {}
        for layer in range(original.layers):
            if has_cross and layer % original.cross_every:
                continue
            previous = [selection for last, selection in best.items() if last < layer]
            if previous:
                importance, layers = max(previous, key=lambda selection: selection[0])
                importance = importance + layer_importance[layer] + (cross_importance[layer] if has_cross else 0.0)
                extended[layer] = (importance, (*layers, layer))
        best = extended
    if not best:
        raise ValueError("no selection of layers fulfills the conditions")
    return max(best.values(), key=lambda selection: selection[0])[1]


def _describe_interval(cross_every: int) -> str:
    return "in every layer" if cross_every == 1 else f"every {cross_every} layers"
