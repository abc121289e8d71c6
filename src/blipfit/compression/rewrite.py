"""A checkpoint folder written anew with some of its tensors replaced; everything else stays byte for byte."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit import run
from blipfit.errors import UserError
from blipfit.model import loading
from blipfit.recipe import ModelConfig

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".index.json")

Edit = Callable[[dict[str, Any]], None]
"""Changes the content of a JSON file in place."""


def source_folder(model: ModelConfig) -> Path:
    """The folder of a checkpoint with all its files; from the hub they are fetched as far as the cache lacks them."""
    place, revision = loading.locate(model)
    if Path(place).is_dir():
        return Path(place)
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    return Path(snapshot_download(place, revision=revision, allow_patterns=wanted))


def rewrite(
    source: Path,
    to: Path,
    tensors: Mapping[str, Tensor],
    ours: Callable[[str], bool],
    edits: Mapping[str, Edit],
    extra: Mapping[str, Any],
) -> None:
    """Write the checkpoint of `source` to `to`: whole or not at all, and never over something.

    Tensors whose names are `ours` are left out and `tensors` stand in their place, each in its shard; JSON files named
    in `edits` are changed, where they are there; `extra` are new JSON files.
    """
    refuse_existing(to)
    with run.replacing(to) as temporary:
        temporary.mkdir()
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            name = str(file.relative_to(source))
            if not name.endswith(_WEIGHT_FILES) and not name.startswith("."):
                _copy(file, temporary / name, edits.get(name))
        _write_weights(source, temporary, tensors, ours)
        for name, value in extra.items():
            run.write_json(temporary / name, value)


def refuse_existing(to: Path) -> None:
    """UserError where a folder has something in it."""
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UserError(f"{to} exists already; give a new folder with --to, or remove it")


def _copy(file: Path, to: Path, edit: Edit | None) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    if edit is None:
        shutil.copyfile(file, to)
    else:
        content = run.read_json(file)
        edit(content)
        run.write_json(to, content)


def _write_weights(source: Path, to: Path, tensors: Mapping[str, Tensor], ours: Callable[[str], bool]) -> None:
    shards = _shards(source)
    place = {name: shard for shard, names in shards.items() for name in names}
    first = next(iter(shards))
    where: dict[str, str] = {}
    size = 0
    for shard in shards:
        with safe_open(source / shard, "pt") as file:
            kept = {name: file.get_tensor(name) for name in file.keys() if not ours(name)}  # noqa: SIM118
            header = file.metadata() or {"format": "pt"}
        new = {name: tensor for name, tensor in tensors.items() if place.get(name, first) == shard}
        kept |= {name: tensor.detach().cpu().contiguous() for name, tensor in new.items()}
        save_file(kept, to / shard, header)
        where |= dict.fromkeys(kept, shard)
        size += sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (to / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _shards(source: Path) -> dict[str, list[str]]:
    """Weight files of a checkpoint with the names of their tensors."""
    if (source / INDEX).is_file():
        files = sorted(set(run.read_json(source / INDEX)["weight_map"].values()))
    else:
        files = [WEIGHTS]
    found = {}
    for name in files:
        if not (source / name).is_file():
            raise UserError(f"{source} has no {name}; get a whole copy")
        with safe_open(source / name, "pt") as file:
            found[name] = list(file.keys())
    return found
