"""Placements: from sublayer names to exact module names. The only file that knows transformers' module paths.

Q-Former `self_attn` = query, value; `cross_attn` = query, key, value and the output dense of the cross-attention;
`ffn` = both dense layers of both feed-forward branches (query and text). The self-attention's output dense is never
adapted. T5 `attn` = q, v of every attention, `ffn` = wi_0, wi_1, wo; Llama `attn` = q_proj, v_proj, `ffn` =
gate_proj, up_proj, down_proj. (Source: the original experiments.)
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from blipfit.errors import UserError
from blipfit.recipe import AdapterPart, Family

_LAYER = r"qformer\.encoder\.layer\.\d+\."
_QFORMER = {
    "self_attn": _LAYER + r"attention\.attention\.(query|value)",
    "cross_attn": _LAYER + r"crossattention\.(attention\.(query|key|value)|output\.dense)",
    "ffn": _LAYER + r"(intermediate|intermediate_query|output|output_query)\.dense",
}
_LANGUAGE = {
    "t5": {
        "attn": r"language_model\..*\.(SelfAttention|EncDecAttention)\.(q|v)",
        "ffn": r"language_model\..*\.DenseReluDense\.(wi_0|wi_1|wo)",
    },
    "vicuna": {
        "attn": r"language_model\..*\.self_attn\.(q_proj|v_proj)",
        "ffn": r"language_model\..*\.mlp\.(gate_proj|up_proj|down_proj)",
    },
}
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


def resolve(model: nn.Module, family: Family, adapter: AdapterPart) -> Placement:
    """Enumerate what an adapter trains in this model.

    ValueError where a sublayer name matches no layer, UserError where a chosen block is none of this model's.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    lora: list[str] = []
    if adapter.qformer != "full":
        for part in adapter.qformer:
            lora += _matching(names, _QFORMER[part], f"qformer {part}")
    inside = _chosen_blocks(names, family, adapter.llm_layers)
    for sublayer in adapter.llm:
        found = _matching(names, _LANGUAGE[family][sublayer], f"llm {sublayer}")
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
            (f"qformer {part}" for part, pattern in _QFORMER.items() if re.match(pattern, name)),
            "qformer other",
        )
    if name.startswith("language_model."):
        for parts in _LANGUAGE.values():
            for part, pattern in parts.items():
                if re.match(pattern, name):
                    return f"llm {part}"
        return "llm other"
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
