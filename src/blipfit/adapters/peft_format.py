"""Adapters on disk: PEFT's format for LoRA and AdaLoRA, the always-trained tensors beside it.

`adapter_config.json` + `adapter_model.safetensors` are what `peft.PeftModel.from_pretrained` reads;
`trained.safetensors` holds what PEFT cannot: query tokens, layer norm, projection and, where it is fully trained, the
Q-Former. Its header carries the adapter's description, so the folder is complete in itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipfit import run
from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, Bank
from blipfit.errors import UserError
from blipfit.model.backbone import Backbone, fingerprint
from blipfit.recipe import AdapterPart

LORA_FILE, TRAINED_FILE = "adapter_model.safetensors", "trained.safetensors"
_CONFIG_FILE = "adapter_config.json"
_PREFIX = "base_model.model."


def save(folder: Path, adapter: AdapterPart, state: Mapping[str, Tensor], base: str, seed: int = 0) -> str:
    """Write an experiment's tensors (`Bank.state`) as an adapter folder; return its SHA-256.

    Of AdaLoRA only the triplets with a value are kept, which changes nothing of the model: the folder holds the ranks
    that were paid for.
    """
    if adapter.method == "adalora":
        state = _cleared(state)
    lora = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B, LORA_E))}
    header = {"adapter": adapter.model_dump_json(), "base": base, "seed": str(seed), "format": "pt"}
    with run.replacing(folder) as temporary:
        temporary.mkdir()
        save_file(_movable({n: t for n, t in state.items() if n not in lora}), temporary / TRAINED_FILE, header)
        if lora:
            stored = _cut(lora) if adapter.method == "adalora" else {f"{name}.weight": t for name, t in lora.items()}
            save_file(_movable({f"{_PREFIX}{name}": t for name, t in stored.items()}), temporary / LORA_FILE)
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
            lora = {name.removeprefix(_PREFIX).removesuffix(".weight"): tensor for name, tensor in lora.items()}
            if adapter.method == "adalora":
                lora = _whole(lora, json.loads((folder / _CONFIG_FILE).read_text(encoding="utf-8"))["rank_pattern"])
            state |= lora
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
    """Whether an adapter makes another model of the base: some B (AdaLoRA: E) is not zero or some trained tensor
    moved."""
    gate, others = (LORA_E, (LORA_A, LORA_B)) if adapter.method == "adalora" else (LORA_B, (LORA_A,))
    return any(
        bool(tensor.count_nonzero())
        if name.endswith(gate)
        else not before[name].cpu().equal(tensor.to(before[name].dtype).cpu())
        for name, tensor in after.items()
        if not name.endswith(others)
    )


def digest(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over all tensors in the order of their names."""
    return fingerprint(*(state[name] for name in sorted(state)))


def _peft_config(adapter: AdapterPart, lora: Mapping[str, Tensor], base: str):  # type: ignore[no-untyped-def]
    from peft import AdaLoraConfig, LoraConfig

    layers = sorted({name.rpartition(".")[0] for name in lora})
    if adapter.method == "adalora":
        return AdaLoraConfig(
            init_r=adapter.start_rank,
            target_r=round(adapter.mean_rank),
            lora_alpha=adapter.alpha,  # type: ignore[arg-type]
            lora_dropout=0.0,
            target_modules=layers,
            total_step=1,  # of a training that is over; peft asks for one
            rank_pattern={name: tensor.ne(0).view(-1).tolist() for name, tensor in _values(lora).items()},
            base_model_name_or_path=base,
            inference_mode=True,
        )
    return LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
    )


def _values(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in lora.items() if name.endswith(LORA_E)}


def _cleared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state with zeros in A's rows and B's columns where the value is zero."""
    cleared = dict(state)
    for name, value in _values(state).items():
        layer = name.removesuffix(LORA_E)
        dropped = value.eq(0)
        cleared[layer + LORA_A] = state[layer + LORA_A].masked_fill(dropped, 0)
        cleared[layer + LORA_B] = state[layer + LORA_B].masked_fill(dropped.mT, 0)
    return cleared


def _cut(lora: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the triplets whose value is zero."""
    cut: dict[str, Tensor] = {}
    for name, value in _values(lora).items():
        layer, kept = name.removesuffix(LORA_E), value.ne(0).view(-1)
        cut |= {name: value[kept], layer + LORA_A: lora[layer + LORA_A][kept]}
        cut[layer + LORA_B] = lora[layer + LORA_B][:, kept]
    return cut


def _whole(cut: Mapping[str, Tensor], pattern: Mapping[str, list[bool]]) -> dict[str, Tensor]:
    """The tensors at their start rank again, from `_cut` and which triplets it kept."""
    whole = {}
    for name, kept in pattern.items():
        layer, rows = name.removesuffix(LORA_E), torch.tensor(kept)
        A, B = cut[layer + LORA_A], cut[layer + LORA_B]
        whole[name] = cut[name].new_zeros(len(kept), 1).index_put((rows,), cut[name])
        whole[layer + LORA_A] = A.new_zeros(len(kept), A.shape[1]).index_put((rows,), A)
        whole[layer + LORA_B] = B.new_zeros(B.shape[0], len(kept))
        whole[layer + LORA_B][:, rows] = B
    return whole


def _movable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
