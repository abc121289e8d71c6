"""Adapter methods by name: blipfit's own two, and those that peft's layers carry out. The one table of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MAX_RANK = 16_384
"""No layer of a published model has more inputs; a larger rank would only exhaust the memory."""
OWN = {"lora": "LoRA", "adalora": "AdaLoRA"}
"""Methods of blipfit's own bank, which trains several experiments at once, with their written names."""
LORA_FIELDS = {"rank": "r", "alpha": "lora_alpha"}
"""Fields of the recipe's adapter that methods of the LoRA family use, with peft's names for them."""


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """How peft is configured for a method.

    A layer of peft holds one adapter, so these methods train one experiment at a time.
    """

    title: str
    """Its written name."""
    config: str
    """peft's configuration class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fixed arguments of that class."""
    rank_fields: Mapping[str, str] = field(default_factory=lambda: LORA_FIELDS)
    """Which of the recipe's rank and alpha the method uses, with peft's names for them."""
    feedforward: str | None = None
    """Argument that lists the feed-forward layers, if the method adapts them in another way."""
    spectral: bool = False
    """Whether the adapter starts from singular vectors of the weights, which are subtracted from the frozen weights."""
    quantization: tuple[str, ...] = ("8bit", "4bit")
    """Quantized weights that the method works with."""
    decays: bool = True
    """Whether AdamW decays its matrices; False for (IA)³, whose neutral value is 1."""


PEFT: Mapping[str, PeftMethod] = {
    # With 8 bit on a CPU, peft's reading of the weight loses bitsandbytes' scales (peft 0.21, bitsandbytes 0.50).
    "dora": PeftMethod("DoRA", "LoraConfig", {"use_dora": True}, quantization=("4bit",)),
    "rslora": PeftMethod("rsLoRA", "LoraConfig", {"use_rslora": True}),
    "pissa": PeftMethod("PiSSA", "LoraConfig", {"init_lora_weights": "pissa"}, spectral=True, quantization=()),
    "ia3": PeftMethod("(IA)³", "IA3Config", rank_fields={}, feedforward="feedforward_modules", decays=False),
}


def has_rank(method: str) -> bool:
    """Whether a method's tensors have a rank."""
    return method in OWN or "rank" in PEFT[method].rank_fields


def title(method: str) -> str:
    """A method's written name."""
    return OWN[method] if method in OWN else PEFT[method].title
