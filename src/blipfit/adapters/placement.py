"""Placements: from the sublayer names of a recipe to exact module names.

Together with `sublayers`, this file knows transformers' module paths.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from blipfit import sublayers
from blipfit.errors import UserError
from blipfit.recipe import AdapterConfig, Family
from blipfit.sublayers import PROJECTION as PROJECTION
from blipfit.sublayers import QUERY_TOKENS as QUERY_TOKENS
from blipfit.sublayers import VISION_NORM as VISION_NORM
from blipfit.sublayers import component_of as component_of

_BLOCK_PATTERNS = {
    "t5": (r"language_model\.encoder\.block\.(\d+)\.", r"language_model\.decoder\.block\.(\d+)\."),
    "vicuna": (r"language_model\.model\.layers\.(\d+)\.",),
}


@dataclass(frozen=True, slots=True)
class Placement:
    """The exact module names that one experiment trains, by how they are trained."""

    lora: tuple[str, ...]
    """Frozen linear layers that get LoRA, or the corresponding parameters of the adapter method."""
    full: tuple[str, ...]
    """Modules (Linear, LayerNorm, Embedding) whose own weights are trained: always the layer norm and the projection,
    and all of the Q-Former if the recipe trains it fully."""

    @property
    def qformer_full(self) -> bool:
        """Whether the Q-Former is fully trained."""
        return any(name.startswith("qformer.") for name in self.full)


def resolve(model: nn.Module, family: Family, adapter: AdapterConfig) -> Placement:
    """List the modules that an adapter trains in this model.

    Raises ValueError if a sublayer name matches no layer of the model, and UserError if `adapter.llm_layers` names a
    block that the language model does not have.
    """
    linear_names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    lora: list[str] = []
    if adapter.qformer != "full":
        for sublayer in adapter.qformer:
            lora += _match_names(linear_names, sublayers.QFORMER[sublayer], f"qformer {sublayer}")
    prefixes = _select_blocks(linear_names, family, adapter.llm_layers)
    for sublayer in adapter.llm:
        names = _match_names(linear_names, sublayers.LANGUAGE[sublayer][family], f"llm {sublayer}")
        lora += [name for name in names if name.startswith(prefixes)]
    full = [VISION_NORM, PROJECTION]
    if adapter.qformer == "full":
        full += [
            name
            for name, module in model.named_modules()
            if name.startswith("qformer.") and isinstance(module, (nn.Linear, nn.LayerNorm, nn.Embedding))
        ]
    return Placement(tuple(lora), tuple(full))


def list_blocks(names: Iterable[str], family: Family) -> list[str]:
    """List the name prefixes of the language model's blocks, in the order in which `llm_layers` counts them.

    `names`: module names of a model.
    """
    prefixes: list[str] = []
    names = list(names)
    for pattern in _BLOCK_PATTERNS[family]:
        prefix_by_number = {int(match[1]): match[0] for name in names if (match := re.match(pattern, name))}
        prefixes += [prefix_by_number[number] for number in sorted(prefix_by_number)]
    return prefixes


def _select_blocks(names: Iterable[str], family: Family, layers: tuple[int, ...] | None) -> tuple[str, ...]:
    """Name prefixes of the blocks with these numbers; every name if `layers` is None."""
    if layers is None:
        return ("",)
    prefixes = list_blocks(names, family)
    if layers[-1] >= len(prefixes):
        order = "encoder first, then decoder" if family == "t5" else "from the input on"
        raise UserError(
            f"adapter.llm_layers has {layers[-1]}, but this language model has blocks 0 to {len(prefixes) - 1} "
            f"({order}); change adapter.llm_layers"
        )
    return tuple(prefixes[layer] for layer in layers)


def is_feedforward(name: str) -> bool:
    """Whether a layer is part of a feed-forward sublayer."""
    return component_of(name) in ("qformer ffn", "llm ffn")


def no_gradient_pattern(model: nn.Module) -> re.Pattern[str]:
    """A pattern for the names of modules that never get a gradient.

    These are the text branch of the Q-Former's last feed-forward: only the outputs of the query tokens are used. LoRA
    there has no effect. The published parameter counts include it, so the grid keeps it.
    """
    last = len(model.qformer.encoder.layer) - 1
    return re.compile(rf"qformer\.encoder\.layer\.{last}\.(intermediate|output)\.")


def _match_names(names: Iterable[str], pattern: str, sublayer: str) -> list[str]:
    """The names that match the pattern of a sublayer. Raises ValueError if there are none."""
    matches = [name for name in names if re.fullmatch(pattern, name)]
    if not matches:
        raise ValueError(f"no layer of this model matches {sublayer} ({pattern})")
    return matches
