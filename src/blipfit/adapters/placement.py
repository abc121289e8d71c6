"""Placements: from sublayer names to exact module names. With `sublayers`, what knows transformers' module paths."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from blipfit import sublayers
from blipfit.errors import UserError
from blipfit.recipe import AdapterConfig, Family

_BLOCKS = {
    "t5": (r"language_model\.encoder\.block\.(\d+)\.", r"language_model\.decoder\.block\.(\d+)\."),
    "vicuna": (r"language_model\.model\.layers\.(\d+)\.",),
}
QUERY_TOKENS = "query_tokens"
VISION_NORM = "vision_model.post_layernorm"
PROJECTION = "language_projection"


@dataclass(frozen=True, slots=True)
class Placement:
    """Exact module names of one experiment, by how they are trained."""

    lora: tuple[str, ...]
    """Linear layers with LoRA, or what the method has for it, beside them."""
    full: tuple[str, ...]
    """Modules (Linear, LayerNorm, Embedding) trained themselves: the always-trained and, if asked for, the Q-Former."""

    @property
    def qformer_full(self) -> bool:
        return any(name.startswith("qformer.") for name in self.full)


def resolve(model: nn.Module, family: Family, adapter: AdapterConfig) -> Placement:
    """Enumerate what an adapter trains in this model.

    ValueError where a sublayer name matches no layer, UserError where a chosen block is none of this model's.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    lora: list[str] = []
    if adapter.qformer != "full":
        for part in adapter.qformer:
            lora += _matching(names, sublayers.QFORMER[part], f"qformer {part}")
    inside = _chosen_blocks(names, family, adapter.llm_layers)
    for sublayer in adapter.llm:
        found = _matching(names, sublayers.LANGUAGE[sublayer][family], f"llm {sublayer}")
        lora += [name for name in found if name.startswith(inside)]
    full = [VISION_NORM, PROJECTION]
    if adapter.qformer == "full":
        full += [
            name
            for name, module in model.named_modules()
            if name.startswith("qformer.") and isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))
        ]
    return Placement(tuple(lora), tuple(full))


def blocks(names: Iterable[str], family: Family) -> list[str]:
    """Module-name prefixes of the language model's blocks, in the order in which `llm_layers` counts them."""
    found: list[str] = []
    listed = list(names)
    for pattern in _BLOCKS[family]:
        numbers = {int(match[1]): match[0] for name in listed if (match := re.match(pattern, name))}
        found += [numbers[number] for number in sorted(numbers)]
    return found


def _chosen_blocks(names: Iterable[str], family: Family, layers: tuple[int, ...] | None) -> tuple[str, ...]:
    if layers is None:
        return ("",)
    there = blocks(names, family)
    if layers[-1] >= len(there):
        told = "encoder first, then decoder" if family == "t5" else "from the input on"
        raise UserError(
            f"adapter.llm_layers has {layers[-1]}, but this language model has blocks 0 to {len(there) - 1} ({told})"
        )
    return tuple(there[layer] for layer in layers)


def component(name: str) -> str:
    """Where a parameter belongs: the row of a cost table."""
    if name.startswith("qformer."):
        return next(
            (f"qformer {part}" for part, pattern in sublayers.QFORMER.items() if re.match(pattern, name)),
            "qformer other",
        )
    if name.startswith("language_model."):
        return next(
            (
                f"llm {part}"
                for part, patterns in sublayers.LANGUAGE.items()
                if any(re.match(pattern, name) for pattern in patterns.values())
            ),
            "llm other",
        )
    if name.startswith(QUERY_TOKENS):
        return "query tokens"
    if name.startswith(VISION_NORM):
        return "vision layer norm"
    return "projection" if name.startswith(PROJECTION) else "vision"


def feedforward(name: str) -> bool:
    """Whether a layer is part of a feed-forward sublayer."""
    return component(name) in ("qformer ffn", "llm ffn")


def without_gradient(model: nn.Module) -> re.Pattern[str]:
    """Modules that never get a gradient: the text branch of the Q-Former's last feed-forward (only queries are read).

    LoRA there is dead. The published counts include it, so the grid keeps it.
    """
    last = len(model.qformer.encoder.layer) - 1  # type: ignore[union-attr, arg-type]
    return re.compile(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\.")


def _matching(names: Iterable[str], pattern: str, what: str) -> list[str]:
    found = [name for name in names if re.fullmatch(pattern, name)]
    if not found:
        raise ValueError(f"no layer of this model matches {what} ({pattern})")
    return found
