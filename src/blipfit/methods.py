"""Adapter methods by name: blipfit's own two, and those that peft's layers carry out. The one table of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

OWN = {"lora": "LoRA", "adalora": "AdaLoRA"}
"""Methods that blipfit's bank carries out for several experiments at once, with their written names."""
RANKED = {"rank": "r", "alpha": "lora_alpha"}
"""Fields of the recipe's adapter that a method of the LoRA family reads, and peft's names of them."""


@dataclass(frozen=True, slots=True)
class PeftMethod:
    """What a method is to peft; one experiment at a time, for a layer of peft holds one."""

    title: str
    """Its written name."""
    config: str
    """peft's configuration class."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Fixed arguments of that class."""
    reads: Mapping[str, str] = field(default_factory=lambda: RANKED)
    """Of the recipe's rank and alpha those that it reads, and peft's names of them."""
    feedforward: str | None = None
    """Argument that lists the feed-forward layers, where they are adapted in another way."""
    spectral: bool = False
    """Whether it starts from the weights' singular vectors and takes them out of the frozen weights."""
    quantization: tuple[str, ...] = ("8bit", "4bit")
    """Quantized weights that it can stand beside."""
    decays: bool = True
    """Whether AdamW decays its matrices; not where a tensor that does nothing is not zero."""


PEFT: Mapping[str, PeftMethod] = {
    # With 8 bit on a CPU, peft's reading of the weight loses bitsandbytes' scales (peft 0.21, bitsandbytes 0.50).
    "dora": PeftMethod("DoRA", "LoraConfig", {"use_dora": True}, quantization=("4bit",)),
    "rslora": PeftMethod("rsLoRA", "LoraConfig", {"use_rslora": True}),
    "pissa": PeftMethod("PiSSA", "LoraConfig", {"init_lora_weights": "pissa"}, spectral=True, quantization=()),
    "ia3": PeftMethod("(IA)³", "IA3Config", reads={}, feedforward="feedforward_modules", decays=False),
}


def ranked(method: str) -> bool:
    """Whether a method's tensors have a rank."""
    return method in OWN or "rank" in PEFT[method].reads


def title(method: str) -> str:
    """A method's written name."""
    return OWN[method] if method in OWN else PEFT[method].title
