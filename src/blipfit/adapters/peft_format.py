"""Adapters on disk: PEFT's format for LoRA, the always-trained tensors beside it.

`adapter_config.json` + `adapter_model.safetensors` are what `peft.PeftModel.from_pretrained` reads;
`trained.safetensors` holds what PEFT cannot: query tokens, layer norm, projection and, where it is fully trained, the
Q-Former. Its header carries the adapter's description, so the folder is complete in itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipfit import run
from blipfit.adapters.bank import LORA_A, LORA_B, Bank
from blipfit.errors import UserError
from blipfit.model.backbone import Backbone, fingerprint
from blipfit.recipe import AdapterPart

LORA_FILE, TRAINED_FILE = "adapter_model.safetensors", "trained.safetensors"
_PREFIX = "base_model.model."


def save(folder: Path, adapter: AdapterPart, state: Mapping[str, Tensor], base: str, seed: int = 0) -> str:
    """Write an experiment's tensors (`Bank.state`) as an adapter folder; return its SHA-256."""
    lora = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B))}
    header = {"adapter": adapter.model_dump_json(), "base": base, "seed": str(seed), "format": "pt"}
    with run.replacing(folder) as temporary:
        temporary.mkdir()
        save_file(_movable({n: t for n, t in state.items() if n not in lora}), temporary / TRAINED_FILE, header)
        if lora:
            save_file(
                _movable({f"{_PREFIX}{name}.weight": tensor for name, tensor in lora.items()}),
                temporary / LORA_FILE,
            )
            _peft_config(adapter, lora, base).save_pretrained(str(temporary))
    return digest(state)


def read(folder: Path) -> tuple[AdapterPart, dict[str, Tensor]]:
    """Read an adapter folder back: its description and all its tensors."""
    try:
        with safe_open(folder / TRAINED_FILE, "pt") as file:
            adapter = AdapterPart.model_validate(json.loads(file.metadata()["adapter"]))
        state = load_file(folder / TRAINED_FILE)
        if (folder / LORA_FILE).exists():
            lora = load_file(folder / LORA_FILE)
            state |= {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in lora.items()}
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no adapter folder of blipfit: it has no {TRAINED_FILE}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{folder} is damaged ({told}); copy it again or train again") from None
    return adapter, state


def install(backbone: Backbone, folder: Path) -> tuple[Bank, str]:
    """Put a saved adapter into a backbone as a bank of one; return the bank and the adapter's SHA-256.

    Refuses an adapter of another model (names or shapes differ) and one that changes nothing, which would silently
    be judged as the base model.
    """
    adapter, state = read(folder)
    bank = Bank(backbone, [adapter], [0])
    before = bank.state(0)
    try:
        bank.load_state(0, state)
    except ValueError as error:
        bank.remove()
        raise UserError(f"{folder} was not trained on {backbone.name}: {error}") from None
    if not changes(adapter, before, state):
        bank.remove()
        raise UserError(f"{folder} changes nothing of {backbone.name}: it was saved untrained; train it first")
    return bank, digest(state)


def changes(adapter: AdapterPart, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether an adapter makes another model of the base: some B is not zero or some trained tensor moved."""
    return any(
        bool(tensor.count_nonzero())
        if name.endswith(LORA_B)
        else not before[name].cpu().equal(tensor.to(before[name].dtype).cpu())
        for name, tensor in after.items()
        if not name.endswith(LORA_A)
    )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors in the order of their names."""
    return fingerprint(*(state[name] for name in sorted(state)))


def _peft_config(adapter: AdapterPart, lora: Mapping[str, Tensor], base: str):  # type: ignore[no-untyped-def]
    from peft import LoraConfig

    layers = sorted({name.rpartition(".")[0] for name in lora})
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _movable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
