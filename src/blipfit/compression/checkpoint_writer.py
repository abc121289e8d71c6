"""Write a checkpoint folder anew with some of its tensors replaced; all other content is copied byte for byte."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from blipfit import disk_space, run_folder
from blipfit.errors import UserError
from blipfit.model import checkpoint_files, loading
from blipfit.recipe import ModelConfig

CONFIG_FILE = "config.json"
_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".msgpack", ".h5", ".index.json")

JsonEdit = Callable[[dict[str, Any]], None]
"""Changes the content of a JSON file in place."""


def checkpoint_folder(model: ModelConfig) -> Path:
    """Return the folder of a checkpoint with all its files; those that the local hub cache lacks are downloaded.

    Raises UserError if there is no such model.
    """
    location, revision = loading.locate_checkpoint(model)
    if Path(location).is_dir():
        return Path(location)
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.txt", "*.model", "*.safetensors"]
    return Path(snapshot_download(location, revision=revision, allow_patterns=patterns))


def rewrite_checkpoint(
    source: Path,
    target: Path,
    *,
    replaced: Callable[[str], bool],
    tensors: Mapping[str, Tensor],
    edits: Mapping[str, JsonEdit],
    new_files: Mapping[str, Any],
) -> None:
    """Write the checkpoint of folder `source` to a new folder `target`, completely or not at all.

    `replaced(name)`: whether a tensor of the source is left out. `tensors`: what is written instead, each tensor into
    the shard where the source has one of that name, else into the first shard. `edits`: name of a JSON file → how it is
    changed; files that the source lacks are skipped. `new_files`: name → content of additional JSON files. Raises
    UserError if `target` exists already or if a weight file is missing.
    """
    refuse_existing(target)
    with run_folder.replacing(target) as temporary:
        temporary.mkdir()
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            name = str(file.relative_to(source))
            if not name.endswith(_WEIGHT_SUFFIXES) and not name.startswith("."):
                _copy_file(file, temporary / name, edits.get(name))
        _write_weights(source, temporary, replaced, tensors)
        for name, value in new_files.items():
            run_folder.write_json(temporary / name, value)


def require_space(source: Path, target: Path, share: float, new_bytes: int) -> None:
    """Raise UserError if the disk of `target` has too little room for a copy of the checkpoint folder `source`.

    `share`: how much of the source's weights is copied. `new_bytes`: size of the tensors that replace the others.
    """
    sizes = {file: file.stat().st_size for file in source.rglob("*") if file.is_file()}
    weights = sum(size for file, size in sizes.items() if file.suffix == ".safetensors")
    others = [size for file, size in sizes.items() if not file.name.endswith(_WEIGHT_SUFFIXES)]
    needed = round(share * weights) + new_bytes + disk_space.file_bytes_on_disk(others)
    disk_space.require_space(target, needed, f"the files of {target}")


def refuse_existing(folder: Path) -> None:
    """Raise UserError if a folder is not empty, or if the path is a file."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; give a new folder with --to, or remove it")


def _copy_file(file: Path, target: Path, edit: JsonEdit | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if edit is None:
        shutil.copyfile(file, target)
    else:
        content = run_folder.read_json(file)
        edit(content)
        run_folder.write_json(target, content)


def _write_weights(source: Path, target: Path, replaced: Callable[[str], bool], tensors: Mapping[str, Tensor]) -> None:
    """Write every shard of the source with its tensors replaced, and the index if there are several shards."""
    shards = _list_shards(source)
    shard_of = {name: shard for shard, names in shards.items() for name in names}
    first_shard = next(iter(shards))
    weight_map: dict[str, str] = {}
    total_size = 0
    for shard in shards:
        with safe_open(source / shard, "pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys() if not replaced(name)}  # noqa: SIM118
            header = file.metadata() or {"format": "pt"}
        new = {name: tensor for name, tensor in tensors.items() if shard_of.get(name, first_shard) == shard}
        content |= {name: tensor.detach().cpu().contiguous() for name, tensor in new.items()}
        save_file(content, target / shard, header)
        weight_map |= dict.fromkeys(content, shard)
        total_size += sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
        (target / checkpoint_files.INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _list_shards(source: Path) -> dict[str, list[str]]:
    """Return the weight files that transformers reads from a checkpoint, each with the names of its tensors.

    Raises UserError if one is missing.
    """
    shards = {}
    for path in checkpoint_files.weight_files(source, str(source)):
        with safe_open(path, "pt") as file:
            shards[path.name] = list(file.keys())
    return shards
