"""Adapters on disk: LoRA in PEFT's format, with the always-trained tensors in a second file.

`peft.PeftModel.from_pretrained` reads `adapter_config.json` and `adapter_model.safetensors`. `trained.safetensors`
holds what PEFT cannot: query tokens, layer norm, projection and, if it is fully trained, the Q-Former. Its header holds
the adapter's configuration, so the folder is complete in itself. `load_adapter.py` in it loads both files without
blipfit; a key in `adapter_config.json` makes peft warn that it alone loads a part only.

Dimensions of AdaLoRA's tensors: `r` rank, `I` inputs, `O` outputs of a layer; A `r × I`, E `r × 1`, B `O × r`. A
triplet is a row of A, a value of E and a column of B.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from blipfit import run_folder
from blipfit.adapters import peft_layers
from blipfit.adapters.bank import LORA_A, LORA_B, LORA_E, RANKNUM_EPSILON, Bank
from blipfit.errors import UserError
from blipfit.methods import PEFT
from blipfit.model import checkpoint_files
from blipfit.model.backbone import Backbone, fingerprint
from blipfit.recipe import AdapterConfig

LORA_FILE, TRAINED_FILE = "adapter_model.safetensors", "trained.safetensors"
CONFIG_FILE, LOADER_FILE, README_FILE = "adapter_config.json", "load_adapter.py", "README.md"
_README = """# Adapter for {base}

`PeftModel.from_pretrained` alone is not enough: it does not read `trained.safetensors` (query tokens, layer norm,
projection), so the model is not the one that was trained and evaluated. Load the adapter with
`from load_adapter import load; model = load()` in this folder, or with `blipfit.load(adapter=FOLDER)`.
"""
_PREFIX = "base_model.model."
MAX_VALUES = 2**30
"""Most values of an AdaLoRA adapter; one of rank 12 on every layer of Vicuna-13B has 40 million."""


@dataclass(frozen=True, slots=True)
class BaseModel:
    """The model that an adapter was trained on; what an older blipfit did not record is None."""

    name: str
    sha256: str | None = None
    """Digest of its weights (`checkpoint_files.digest`)."""
    family: str | None = None
    folder: str | None = None
    """Where it was, as an absolute path; None for a hub name or a miniature."""

    @classmethod
    def of(cls, backbone: Backbone, name: str | None = None) -> "BaseModel":
        """The base of a loaded model. `name`: as the recipe has it, by default the model's own name."""
        name, files = name or backbone.name, backbone.weight_files
        folder = files[0].parent.resolve() if files else None
        is_path = folder is not None and folder == Path(name).expanduser().resolve()
        return cls(name, backbone.base_sha256, backbone.family, str(folder) if is_path else None)


@dataclass(frozen=True, slots=True)
class SavedAdapter:
    """What an adapter folder holds, read once."""

    folder: Path
    config: AdapterConfig
    state: Mapping[str, Tensor]
    """All tensors by the bank's names, on the CPU."""
    sha256: str
    """SHA-256 of the tensors."""
    base: BaseModel
    """The model that it was trained on."""


def save(
    folder: Path, adapter: AdapterConfig, state: Mapping[str, Tensor], base: str | BaseModel, seed: int = 0
) -> str:
    """Write an experiment's tensors as an adapter folder; an existing folder is replaced.

    `state`: the tensors of `Bank.state`. `base`: the model that was trained, or its name alone. `seed`: recorded in the
    header.

    AdaLoRA is written as plain LoRA with a rank per layer and E multiplied into A: only the triplets with a value, for
    any program that reads LoRA. (peft's own format of a pruned AdaLoRA makes peft warn that it ignores the ranks.)

    Returns the SHA-256 of the tensors as `read` returns them.
    """
    is_adalora = adapter.method == "adalora"
    state = _fold_values(state) if is_adalora else state
    if adapter.method in PEFT:
        lora = peft_layers.select_peft_tensors(adapter.method, state)
    else:
        lora = {name: tensor for name, tensor in state.items() if name.endswith((LORA_A, LORA_B, LORA_E))}
    base = BaseModel(base) if isinstance(base, str) else base
    identity = {"base_sha256": base.sha256, "base_family": base.family, "base_folder": base.folder}
    header = {"adapter": adapter.model_dump_json(), "base": base.name, "seed": str(seed), "format": "pt"}
    header |= {key: value for key, value in identity.items() if value is not None}
    if is_adalora:
        sizes = {n: (lora[f"{n}.{LORA_A}"].shape[1], lora[f"{n}.{LORA_B}"].shape[0]) for n in _values_by_layer(lora)}
        header["layers"] = json.dumps(sizes)
    saved_lora = _cut_padding(lora) if is_adalora else lora
    with run_folder.replacing(folder) as temporary:
        temporary.mkdir()
        save_file(_move_to_cpu({n: t for n, t in state.items() if n not in lora}), temporary / TRAINED_FILE, header)
        if saved_lora:
            suffix = _name_suffix(adapter)
            tensors = _move_to_cpu({f"{_PREFIX}{name}{suffix}": t for name, t in saved_lora.items()})
            save_file(tensors, temporary / LORA_FILE)
            config = _make_peft_config(adapter, saved_lora, base.name)
            for field, value in vars(config).items():
                if isinstance(value, set):  # its order differs from one process to the next
                    setattr(config, field, sorted(value))
            config.save_pretrained(str(temporary))
            _add_notice(temporary / CONFIG_FILE)
        shutil.copyfile(Path(__file__).with_name(LOADER_FILE), temporary / LOADER_FILE)
        (temporary / README_FILE).write_text(_README.format(base=base.name), encoding="utf-8")
    return digest(state)


def _add_notice(file: Path) -> None:
    """Add a key to peft's configuration that peft does not know: it ignores the key with a warning that names it."""
    from blipfit.adapters.load_adapter import NOTICE

    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**settings, NOTICE: True}, indent=2) + "\n", encoding="utf-8")


def read(folder: Path) -> tuple[AdapterConfig, dict[str, Tensor]]:
    """Read an adapter folder.

    Returns the adapter's configuration and all its tensors by the bank's names, on the CPU. Raises UserError if the
    folder is not an adapter folder, its files are damaged, or a value is NaN or infinite.
    """
    try:
        with safe_open(folder / TRAINED_FILE, "pt") as file:
            header = file.metadata()
            adapter = AdapterConfig.model_validate(json.loads(header["adapter"]))
        state, lora = load_file(folder / TRAINED_FILE), {}
        if (folder / LORA_FILE).exists():
            lora = load_file(folder / LORA_FILE)
            suffix = _name_suffix(adapter)
            lora = {name.removeprefix(_PREFIX).removesuffix(suffix): tensor for name, tensor in lora.items()}
        _check_ranks(adapter, lora)
        if adapter.method == "adalora":
            lora = _restore_padding(lora, json.loads(header["layers"]), adapter.start_rank)
        state |= lora
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"{folder} is not an adapter folder of blipfit: it has no {TRAINED_FILE}; "
            "give the folder `adapter` of a finished run"
        ) from None
    except (SafetensorError, KeyError, TypeError, ValueError, AttributeError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{folder} is damaged ({reason:.300}); copy it again or train again") from None
    if name := checkpoint_files.find_non_finite(state):
        raise UserError(f"{folder}: the tensor {name} is not finite (it holds NaN or infinity); train it again")
    return adapter, state


def read_saved(folder: Path) -> SavedAdapter:
    """Read an adapter folder with its digest and the model that it was trained on. Raises UserError as `read`."""
    config, state = read(folder)
    with safe_open(folder / TRAINED_FILE, "pt") as file:
        header = file.metadata()
    if "base" not in header:
        raise UserError(f"{folder} is damaged ({TRAINED_FILE} names no base model); copy it again or train again")
    base = BaseModel(header["base"], *(header.get(f"base_{key}") for key in ("sha256", "family", "folder")))
    return SavedAdapter(folder, config, state, digest(state), base)


def install(backbone: Backbone, saved: SavedAdapter | Path) -> tuple[Bank, str]:
    """Install a saved adapter, or the one in a folder, in a backbone, as a bank of one experiment.

    Returns the bank and the SHA-256 of the adapter's tensors. Raises UserError if the folder cannot be read, if the
    adapter was trained on another model (names or shapes differ), or if it changes nothing, because it would then be
    evaluated as the base model without notice.
    """
    saved = read_saved(saved) if isinstance(saved, Path) else saved
    folder, adapter, state = saved.folder, saved.config, saved.state
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
    return bank, saved.sha256


def changes(adapter: AdapterConfig, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """Whether training changed what the model computes.

    `before` and `after`: the experiment's tensors at the start and now. LoRA changes the model if some B is not zero,
    AdaLoRA if some E is not zero; the always-trained tensors do if they differ from the start.
    """
    if adapter.method in PEFT:
        return peft_layers.changes(before, after)
    gate, others = (LORA_E, (LORA_A, LORA_B)) if adapter.method == "adalora" else (LORA_B, (LORA_A,))
    return any(
        bool(tensor.count_nonzero())
        if name.endswith(gate)
        else not before[name].cpu().equal(tensor.to(before[name].dtype).cpu())
        for name, tensor in after.items()
        if not name.endswith(others)
    )


def digest(state: Mapping[str, Tensor]) -> str:
    """Compute the SHA-256 of all tensors, in the order of their names."""
    return fingerprint(*(state[name] for name in sorted(state)))


def _name_suffix(adapter: AdapterConfig) -> str:
    """What tensor names end with in the file, but not in the bank; those of peft's layers are the same in both."""
    return "" if adapter.method in PEFT else ".weight"


def _make_peft_config(adapter: AdapterConfig, lora: Mapping[str, Tensor], base: str) -> Any:
    """peft's configuration for these LoRA tensors; for AdaLoRA with a rank and an alpha per layer."""
    if adapter.method in PEFT:
        return peft_layers.make_saved_config(adapter, lora, base)
    from peft import LoraConfig

    layers = sorted({name.rpartition(".")[0] for name in lora})
    patterns = {}
    if adapter.method == "adalora":
        ranks = {layer: len(lora[f"{layer}.{LORA_A}"]) for layer in layers}
        scale = adapter.alpha / (adapter.start_rank + RANKNUM_EPSILON)
        patterns = {"rank_pattern": ranks, "alpha_pattern": {layer: scale * rank for layer, rank in ranks.items()}}
    return LoraConfig(
        r=adapter.start_rank,
        lora_alpha=adapter.alpha,
        lora_dropout=0.0,
        target_modules=layers,
        base_model_name_or_path=base,
        inference_mode=True,
        **patterns,
    )


def _values_by_layer(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's E of every layer."""
    return {name.removesuffix(f".{LORA_E}"): tensor for name, tensor in state.items() if name.endswith(LORA_E)}


def _fold_values(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """AdaLoRA's tensors with E multiplied into A, at their start rank.

    Triplets whose value is not zero come first and get the value 1; the others are all zero.
    """
    folded = dict(state)
    for layer, E in _values_by_layer(state).items():
        is_active = E.ne(0).view(-1)
        A, B = state[f"{layer}.{LORA_A}"], state[f"{layer}.{LORA_B}"]
        folded |= _pad_layer(layer, (A * E)[is_active], B[:, is_active], len(E))
    return folded


def _pad_layer(layer: str, A: Tensor, B: Tensor, rank: int) -> dict[str, Tensor]:
    """A layer's A, E (1 for each triplet) and B, padded with zeros to this rank."""
    padding = rank - len(A)
    E = F.pad(A.new_ones(len(A), 1), (0, 0, 0, padding))
    return {
        f"{layer}.{LORA_A}": F.pad(A, (0, 0, 0, padding)),
        f"{layer}.{LORA_E}": E,
        f"{layer}.{LORA_B}": F.pad(B, (0, padding)),
    }


def _cut_padding(folded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain LoRA tensors of the layers that have an active triplet, each with its own rank."""
    lora = {}
    for layer, E in _values_by_layer(folded).items():
        if rank := int(E.count_nonzero()):
            lora[f"{layer}.{LORA_A}"] = folded[f"{layer}.{LORA_A}"][:rank]
            lora[f"{layer}.{LORA_B}"] = folded[f"{layer}.{LORA_B}"][:, :rank]
    return lora


def _restore_padding(lora: Mapping[str, Tensor], layers: Mapping[str, list[int]], rank: int) -> dict[str, Tensor]:
    """The inverse of `_cut_padding`; `layers`: the numbers of inputs and outputs of every layer.

    Raises ValueError if a tensor belongs to none of the layers, or if these are too large.
    """
    if unknown := sorted(lora.keys() - {f"{layer}.{part}" for layer in layers for part in (LORA_A, LORA_B)}):
        raise ValueError(f"{TRAINED_FILE} names no layer of the tensor {unknown[0]} in {LORA_FILE}")
    sizes = [size for pair in layers.values() for size in pair]
    if any(type(size) is not int or size < 1 for size in sizes) or rank * sum(sizes) > MAX_VALUES:
        raise ValueError(f"{TRAINED_FILE} names layers of impossible sizes")
    folded: dict[str, Tensor] = {}
    for layer, (inputs, outputs) in layers.items():
        A = lora.get(f"{layer}.{LORA_A}", torch.zeros(0, inputs))
        B = lora.get(f"{layer}.{LORA_B}", torch.zeros(outputs, 0))
        folded |= _pad_layer(layer, A, B, rank)
    return folded


def _check_ranks(adapter: AdapterConfig, lora: Mapping[str, Tensor]) -> None:
    """Raise ValueError unless the tensors have the rank of the configuration, for which a bank allocates memory.

    AdaLoRA's tensors may have any lower rank, or be absent.
    """
    ranks = {len(tensor) for name, tensor in lora.items() if f".{LORA_A}" in name and tensor.ndim}
    if adapter.method == "adalora":
        ranks = {rank for rank in ranks if rank > adapter.start_rank}
    elif not lora and adapter.has_lora:
        raise ValueError(f"it has no {LORA_FILE}")
    if wrong := sorted(ranks - {adapter.start_rank}):
        raise ValueError(f"{LORA_FILE} has rank {wrong[0]}, but {TRAINED_FILE} names rank {adapter.start_rank}")


def _move_to_cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
