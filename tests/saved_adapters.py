"""Adapters of every method, saved as training would leave them."""

from pathlib import Path
from typing import Any

import torch

import checkpoints
from blipfit.adapters import peft_format
from blipfit.adapters.bank import Bank
from blipfit.recipe import AdaLoRAConfig, AdapterConfig

LAYERS: dict[str, Any] = {"qformer": ("self_attn", "ffn"), "llm": ("attn", "ffn")}
RANKS: dict[str, Any] = {"rank": 3, "alpha": 6}
ADAPTERS = {
    "lora": AdapterConfig(**LAYERS, **RANKS),
    "adalora": AdapterConfig(method="adalora", **LAYERS, alpha=6, adalora=AdaLoRAConfig(init_rank=4, target_rank=2)),
    "dora": AdapterConfig(method="dora", **LAYERS, **RANKS),
    "rslora": AdapterConfig(method="rslora", **LAYERS, **RANKS),
    "pissa": AdapterConfig(method="pissa", **LAYERS, **RANKS),
    "ia3": AdapterConfig(method="ia3", **LAYERS),
    "full Q-Former": AdapterConfig(qformer="full", llm=("ffn",), rank=2),
    "always-trained tensors only": AdapterConfig(),
}


def save_trained(folder: Path, base: Path, adapter: AdapterConfig) -> Path:
    """Save an adapter whose tensors all differ from the start; some triplets of AdaLoRA are zero, as after pruning."""
    backbone = checkpoints.load(base)
    bank = Bank(backbone, [adapter], [3])
    bank.values.add_(torch.randn(bank.values.shape, generator=torch.Generator().manual_seed(3)), alpha=0.02)
    state = bank.state(0)
    for number, name in enumerate(sorted(name for name in state if name.endswith("lora_E"))):
        state[name][: (4, 1, 0, 3)[number % 4]] = 0
    peft_format.save(folder, adapter, state, peft_format.BaseModel.of(backbone))
    bank.remove()
    return folder
