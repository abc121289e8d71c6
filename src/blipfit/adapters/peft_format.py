"""Adapters on disk: PEFT's format for LoRA, the always-trained tensors beside it.

`adapter_config.json` + `adapter_model.safetensors` are what `peft.PeftModel.from_pretrained` reads;
`trained.safetensors` holds what PEFT cannot: query tokens, layer norm, projection and, where it is fully trained, the
Q-Former. Its header carries the adapter's description, so the folder is complete in itself.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipfit import run
from blipfit.adapters import peft_methods
from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, RANKNUM_EPSILON, Bank
from blipfit.errors import UserError
from blipfit.methods import PEFT
from blipfit.model.backbone import Backbone, fingerprint
from blipfit.recipe import AdapterConfig

LORA_FILE, TRAINED_FILE = "adapter_model.safetensors", "trained.safetensors"
_PREFIX = "base_model.model."


def save(folder: Path, adapter: AdapterConfig, state: Mapping[str, Tensor], base: str, seed: int = 0) -> str:
    """Write an experiment's tensors (`Bank.state`) as an adapter folder; return its SHA-256.

    AdaLoRA is written as plain LoRA with a rank for each layer, its values multiplied into A: only what was kept, for
    any reader of LoRA. (peft's own format of a pruned AdaLoRA makes peft warn that the ranks are ignored.) The hash is
    of these tensors.
    """
    adaptive = adapter.method == "adalora"
    state = _folded(state) if adaptive else state
    if adapter.method in PEFT:
        lora = peft_methods.stored(adapter.method, state)
    else:
        lora = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B, LORA_E))}
    header = {"adapter": adapter.model_dump_json(), "base": base, "seed": str(seed), "format": "pt"}
    if adaptive:
        sizes = {n: (lora[f"{n}.{LORA_A}"].shape[1], lora[f"{n}.{LORA_B}"].shape[0]) for n in _values(lora)}
        header["layers"] = json.dumps(sizes)
    stored = _cut(lora) if adaptive else lora
    with run.replacing(folder) as temporary:
        temporary.mkdir()
        save_file(_movable({n: t for n, t in state.items() if n not in lora}), temporary / TRAINED_FILE, header)
        if stored:
            suffix = _suffix(adapter)
            save_file(_movable({f"{_PREFIX}{name}{suffix}": t for name, t in stored.items()}), temporary / LORA_FILE)
            _peft_config(adapter, stored, base).save_pretrained(str(temporary))
    return digest(state)


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter folder back: its description and all its tensors."""
    try:
        with safe_open(folder / TRAINED_FILE, "pt") as file:
            header = file.metadata()
            adapter = AdapterConfig.model_validate(json.loads(header["adapter"]))
        state, lora = load_file(folder / TRAINED_FILE), {}
        if (folder / LORA_FILE).exists():
            lora = load_file(folder / LORA_FILE)
            suffix = _suffix(adapter)
            lora = {name.removeprefix(_PREFIX).removesuffix(suffix): tensor for name, tensor in lora.items()}
        if adapter.method == "adalora":
            lora = _whole(lora, json.loads(header["layers"]), adapter.start_rank)
        state |= lora
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder} is no adapter folder of blipfit: it has no {TRAINED_FILE}") from None
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        told = " ".join(str(error).split())
        raise UserError(f"{folder} is damaged ({told}); copy it again or train again") from None
    return adapter, state


def base(folder: Path) -> str:
    """The name of the model that an adapter folder was trained on."""
    read(folder)  # says what is wrong with it
    with safe_open(folder / TRAINED_FILE, "pt") as file:
        return file.metadata()["base"]


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


def changes(adapter: AdapterConfig, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether an adapter makes another model of the base: some B (AdaLoRA: E) is not zero or some trained tensor
    moved."""
    if adapter.method in PEFT:
        return peft_methods.changes(before, after)
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


def _suffix(adapter: AdapterConfig) -> str:
    """What the file's names have beyond the bank's; tensors of peft's layers have peft's names already."""
    return "" if adapter.method in PEFT else ".weight"


def _peft_config(adapter: AdapterConfig, lora: Mapping[str, Tensor], base: str):  # type: ignore[no-untyped-def]
    if adapter.method in PEFT:
        return peft_methods.saved_configuration(adapter, lora, base)
    from peft import LoraConfig

    layers = sorted({name.rpartition(".")[0] for name in lora})
    pattern = {}
    if adapter.method == "adalora":
        ranks = {layer: len(lora[f"{layer}.{LORA_A}"]) for layer in layers}
        scale = adapter.alpha / (adapter.start_rank + RANKNUM_EPSILON)
        pattern = {"rank_pattern": ranks, "alpha_pattern": {layer: scale * rank for layer, rank in ranks.items()}}
    return LoraConfig(
        r=adapter.start_rank,
        lora_alpha=adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
        **pattern,
    )


def _values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """E of every layer, by layer."""
    return {name.removesuffix(f".{LORA_E}"): tensor for name, tensor in state.items() if name.endswith(LORA_E)}


def _folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's tensors with E multiplied into A: the triplets with a value first, E one for them, the rest zero."""
    folded = dict(state)
    for layer, E in _values(state).items():
        kept = E.ne(0).view(-1)
        A, B = state[f"{layer}.{LORA_A}"], state[f"{layer}.{LORA_B}"]
        folded |= _widened(layer, (A * E)[kept], B[:, kept], len(E))
    return folded


def _widened(layer: str, A: Tensor, B: Tensor, rank: int) -> dict[str, Tensor]:
    """A layer's folded triplets at their start rank again, padded with zeros."""
    more = rank - len(A)
    E = F.pad(A.new_ones(len(A), 1), (0, 0, 0, more))
    return {
        f"{layer}.{LORA_A}": F.pad(A, (0, 0, 0, more)),
        f"{layer}.{LORA_E}": E,
        f"{layer}.{LORA_B}": F.pad(B, (0, more)),
    }


def _cut(folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain LoRA tensors of the layers that kept a triplet, each of its own rank."""
    cut = {}
    for layer, E in _values(folded).items():
        if rank := int(E.count_nonzero()):
            cut[f"{layer}.{LORA_A}"] = folded[f"{layer}.{LORA_A}"][:rank]
            cut[f"{layer}.{LORA_B}"] = folded[f"{layer}.{LORA_B}"][:, :rank]
    return cut


def _whole(cut: Mapping[str, Tensor], layers: Mapping[str, list[int]], rank: int) -> dict[str, Tensor]:
    """What `_cut` was made from; `layers` are their inputs and outputs."""
    whole: dict[str, Tensor] = {}
    for layer, (inputs, outputs) in layers.items():
        A = cut.get(f"{layer}.{LORA_A}", torch.zeros(0, inputs))
        B = cut.get(f"{layer}.{LORA_B}", torch.zeros(outputs, 0))
        whole |= _widened(layer, A, B, rank)
    return whole


def _movable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
