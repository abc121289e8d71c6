"""The files of a checkpoint folder: checks before a model is built, and the digest that identifies its weights."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from blipfit.data import feature_store
from blipfit.errors import UserError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
LFS_HEADER = b"version https://git-lfs.github.com"
_CONVERT = (
    'python -c "import glob, torch, safetensors.torch as s; s.save_file({k: v.clone() for f in '
    "glob.glob('pytorch_model*.bin') for k, v in torch.load(f, weights_only=True).items()}, "
    "'model.safetensors', {'format': 'pt'})\""
)
"""Converts the pickles of the current folder, shards too, without running code in them."""

_SIZES = {
    "": ("num_query_tokens", "image_token_index"),
    "vision_config": (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
        *("image_size", "patch_size"),
    ),
    "qformer_config": (
        *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
        *("max_position_embeddings", "cross_attention_frequency", "encoder_hidden_size"),
    ),
    "text_config": (
        *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads"),
        *("relative_attention_num_buckets", "relative_attention_max_distance"),
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("head_dim", "max_position_embeddings"),
    ),
}
"""Section of config.json → its fields that are sizes; "" is the top level."""
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
_MAX_SIZE, _MAX_LAYERS = 2**24, 1000
"""No published model comes near; larger values would only exhaust time and memory."""
_LAYER = re.compile(r"\.(?:layers?|block)\.\d+\.")
_NOT_READ = re.compile(r"(?:position_ids|inv_freq|EncDecAttention\.relative_attention_bias\.weight)$")
"""Tensors of old copies that transformers does not read either."""


def check(folder: Path, name: str, build_on_meta: Callable[[dict[str, Any], str], nn.Module] | None = None) -> None:
    """Check a local folder before a model is built from it. `name`: the model's name for messages.

    `build_on_meta(config, name)`: creates the model of an InstructBLIP configuration without memory, to compare its
    shapes with those of the weights.

    Raises UserError if it has no safetensors weights, if a file is a Git LFS pointer, or if config.json cannot be used
    or describes other tensors than the weights.
    """
    config = read_config(folder, name)
    files = weight_files(folder, name)
    tensors = _read_headers(files, name)
    if build_on_meta is not None and config.get("model_type") == "instructblip":
        _compare_shapes(build_on_meta(config, name), tensors, name)


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """Read config.json and check its types. Raises UserError if it cannot be used, or names code of the hub."""
    file = folder / "config.json"
    _refuse_lfs_pointer(file)
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{name} cannot be loaded: {file} is not valid JSON ({reason}); get a complete copy") from None
    if not isinstance(config, dict):
        raise UserError(f"{name} cannot be loaded: {file} is not a JSON object; get a complete copy")
    refuse_kernels(config, name)
    if config.get("model_type") == "instructblip":
        check_config(config, name)
    return config


def check_config(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError if a field of an InstructBLIP configuration has the wrong type or an impossible value."""
    for section, sizes in _SIZES.items():
        values = config if section == "" else config.get(section, {})
        prefix = f"{section}." if section else ""
        if not isinstance(values, Mapping):
            raise _wrong_value(name, section, values, "an object")
        for field in [field for field in sizes if values.get(field) is not None]:
            limit = _MAX_LAYERS if field.endswith("_layers") else _MAX_SIZE
            if not _is_integer(values[field]) or not 0 < values[field] <= limit:
                raise _wrong_value(name, prefix + field, values[field], f"a whole number from 1 to {limit}")
        for field in [field for field in _TOKEN_IDS if values.get(field) is not None]:
            ids = values[field] if isinstance(values[field], list) else [values[field]]
            if not ids or not all(_is_integer(number) and -1 <= number <= _MAX_SIZE for number in ids):
                raise _wrong_value(name, prefix + field, values[field], "a token id")
        if (start := values.get("decoder_start_token_id")) is not None and start >= values.get("vocab_size", _MAX_SIZE):
            raise _wrong_value(name, prefix + "decoder_start_token_id", start, "an id of the vocabulary")
        for field in [field for field in values if "dropout" in field and values[field] is not None]:
            if not isinstance(values[field], int | float) or not 0 <= values[field] < 1:
                raise _wrong_value(name, prefix + field, values[field], "a number from 0 to below 1")
        for field in [field for field in ("dtype", "torch_dtype") if values.get(field) is not None]:
            if not isinstance(values[field], str) or not hasattr(torch, values[field].removeprefix("torch.")):
                raise _wrong_value(name, prefix + field, values[field], "the name of a dtype")


def refuse_kernels(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError if a configuration of any model names a kernel of the hub, that is, code, in any section.

    An attention implementation with a `/` is such a name.
    """
    sections = [("", config)]
    while sections:
        prefix, section = sections.pop()
        for field, value in section.items():
            path = f"{prefix}{field}"
            if isinstance(value, Mapping):
                sections.append((f"{path}.", value))
            elif "attn_implementation" in path and "/" in str(value):
                raise UserError(
                    f"{name}: config.json names a kernel of the hub as {path} ({value!r:.100}), and blipfit runs no "
                    "code from the hub; remove the field"
                )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _wrong_value(name: str, field: str, value: Any, expected: str) -> UserError:
    return UserError(f"{name}: {field} in config.json is {value!r:.100}, not {expected}; get a complete copy")


def weight_files(folder: Path, name: str) -> list[Path]:
    """Return the safetensors files that transformers reads from a folder.

    Raises UserError if there are none, if a shard is missing, or if a file is a Git LFS pointer.
    """
    if (folder / WEIGHTS).is_file():
        files = [folder / WEIGHTS]
    elif (folder / INDEX).is_file():
        files = _read_index(folder / INDEX, name)
    elif pickles := sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern)):
        raise UserError(
            f"{name} has its weights in {pickles[0]}, a pickle, which can run code and is not read; convert it in that "
            f"folder with: {_CONVERT}"
        )
    else:
        raise UserError(f"{name} cannot be loaded: no file named {WEIGHTS} or {INDEX}; get a complete copy")
    for file in files:
        if not file.is_file():
            raise UserError(f"{name}: {file.name} is missing, which {INDEX} names; get a complete copy")
        _refuse_lfs_pointer(file)
    return files


def _read_index(file: Path, name: str) -> list[Path]:
    _refuse_lfs_pointer(file)
    try:
        shards = set(json.loads(file.read_text(encoding="utf-8"))["weight_map"].values())
        if not shards or any(not isinstance(shard, str) or Path(shard).name != shard for shard in shards):
            raise ValueError("weight_map must name files of this folder")
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        raise UserError(f"{name}: {file} is damaged ({error}); get a complete copy") from None
    return [file.parent / shard for shard in sorted(shards)]


def _refuse_lfs_pointer(file: Path) -> None:
    try:
        with file.open("rb") as stream:
            start = stream.read(len(LFS_HEADER))
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); get a complete copy") from None
    if start == LFS_HEADER:
        raise UserError(
            f"{file} is a Git LFS pointer, not the file itself; run `git lfs pull` in its repository, or download it "
            "from the hub"
        )


def _read_headers(files: Sequence[Path], name: str) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor in the files."""
    tensors: dict[str, tuple[int, ...]] = {}
    for file in files:
        try:
            with safe_open(file, "pt") as opened:
                tensors |= {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{name} cannot be loaded: {file.name} is damaged ({error}); get a complete copy") from None
    return tensors


def _compare_shapes(model: nn.Module, tensors: Mapping[str, tuple[int, ...]], name: str) -> None:
    """Raise UserError if a tensor has not the shape that the model expects, or if its layer is not in the model."""
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    for key, shape in tensors.items():
        if key in expected and shape != expected[key]:
            raise UserError(f"{name}: {key} is {shape} but config.json asks for {expected[key]}; get a current copy")
    known = {_LAYER.sub(".", key) for key in expected}
    for key in sorted(tensors.keys() - expected.keys()):
        # Other names may be those of an older transformers, which it renames while loading.
        if _LAYER.search(key) and _LAYER.sub(".", key) in known and not _NOT_READ.search(key):
            raise UserError(
                f"{name}: the weights have {key}, for which config.json has no layer; "
                "its numbers of layers are not those of the weights: get a current copy"
            )


def digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 of all tensors in safetensors files: their names, dtypes, shapes and every byte.

    It does not depend on the number of files or the order in them. Several threads hash; within a process the same
    files are read once. Raises UserError if a file is damaged.
    """
    try:
        stats = [(file, file.stat()) for file in files]
        return _digest(tuple((str(file), stat.st_size, stat.st_mtime_ns, stat.st_ino) for file, stat in stats))
    except (SafetensorError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        names = " or ".join(file.name for file in files)
        raise UserError(
            f"{files[0].parent}: {names:.100} is damaged ({error!s:.200}); get a complete copy of the weights"
        ) from None


@lru_cache(maxsize=16)
def _digest(versions: tuple[tuple[str, int, int, int], ...]) -> str:
    """Hash files; size, time and inode are arguments only to be part of the cache key."""
    with ThreadPoolExecutor(feature_store.thread_count()) as pool:
        lines = [line for file, *_ in versions for line in pool.map(_hash_named, _read_tensors(file))]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def _read_tensors(file: str) -> Iterator[tuple[str, Tensor]]:
    with safe_open(file, "pt") as opened:
        for key in opened.keys():  # noqa: SIM118 (it is not a dictionary)
            yield key, opened.get_tensor(key)


def _hash_named(entry: tuple[str, Tensor]) -> str:
    return f"{entry[0]} {hash_tensor(entry[1])}"


def hash_tensor(tensor: Tensor) -> str:
    """Return dtype, shape and SHA-256 of a tensor's bytes as one line."""
    data = tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(data).hexdigest()}"


def find_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or an infinite value, None if all are finite.

    Tensors without floating-point values, such as quantized ones, are skipped.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel() and tensor.element_size() > 1:
            smallest, largest = torch.aminmax(tensor.detach())  # both are NaN if any value is
            if not (smallest.isfinite() & largest.isfinite()):
                return name
    return None
