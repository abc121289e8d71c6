"""The only place that calls `from_pretrained` on InstructBLIP, with the checks that loading needs.

Each check prevents an error that would otherwise go unnoticed; docs/footguns.md lists them.
"""

import contextlib
import importlib.util
import os
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import nn

from blipfit import disk_space
from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import checkpoint_files, tiny
from blipfit.model.backbone import Backbone, language_layers
from blipfit.model.tokenizer_files import check_tokenizers, load_tokenizers
from blipfit.recipe import Family, ModelConfig

MINIATURES: dict[str, Family] = {name: family for family, name in tiny.NAMES.items()}
TOWER_DTYPE = torch.float16
"""Dtype of the ViT's linear layers in 16 bit, also if the language model is in bf16. bf16 has 3 bits less: with it the
features of a random tower of 39 layers are off by 0.63 %, with float16 by 0.08 %, as in the original."""

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
_NOT_QUANTIZED = ["vision_model", "qformer", "language_projection", "lm_head"]
"""Modules that quantization leaves as they are: all but the layers of the language model."""


class InstructBlipForConditionalGeneration(transformers.InstructBlipForConditionalGeneration):
    """InstructBLIP that loads its trainable parts and the ViT in fp32 when `from_pretrained` gets a 16-bit dtype.

    It has its base class's name because `save_pretrained` writes the name into config.json as the architecture.
    """

    # transformers 5 ignores a dtype per submodule; this attribute excludes modules from the cast.
    _keep_in_fp32_modules_strict = {"query_tokens", "qformer", "language_projection", "vision_model"}  # noqa: RUF012


def load(
    model: ModelConfig,
    precision: str = "auto",
    device: torch.device | str = "cpu",
    max_text: int = 128,
    max_target: int = 256,
    shard: Callable[[Sequence[nn.Module]], None] | None = None,
) -> Backbone:
    """Load a checkpoint as a frozen Backbone in eval mode.

    `precision`: see `TrainingConfig.precision`. The Q-Former, its layer norm, the query tokens and the projection stay
    in fp32. In 16 bit, the language model gets the dtype of the precision and the ViT's linear layers float16
    (`halve_tower`). `max_text`, `max_target`: the longest prompt and answer in tokens. `shard`: distributes the layers
    of the language model over the processes, before anything is moved to the device. Raises UserError if the checkpoint
    is not available, is one of the known broken copies, or holds a weight that is not finite.
    """
    device = torch.device(device)
    low_dtype = low_precision_dtype(precision, device)
    folder, revision = locate_checkpoint(model)
    if Path(folder).is_dir():
        checkpoint_files.check(Path(folder), model.name, build_on_meta)
    with quiet():
        options = quantization_options(model.quantization, low_dtype, device)
        hf = load_weights(folder, revision, low_dtype or torch.float32, model.name, options)
        qformer_tokenizer, tokenizer = load_tokenizers(folder, revision)
    family = family_of(hf.config)
    _refuse_non_finite(hf, model.name)
    prepare_model(hf, family, model.name)
    if low_dtype is not None:
        halve_tower(hf)
    if max_text > (positions := hf.config.qformer_config.max_position_embeddings):
        raise UserError(
            f"{model.name}: the Q-Former reads at most {positions} tokens; lower training.max_text_tokens={max_text}"
        )
    hf.requires_grad_(False).eval()
    if shard is not None:
        shard(language_layers(hf.language_model, family))
    if model.quantization == "none":  # a quantized model is loaded to its device
        hf.to(device)
    check_tokenizers(hf, family, qformer_tokenizer, tokenizer, model.name)
    text = TextEncoder(qformer_tokenizer, tokenizer, family, decoder_start_id(hf, family), max_text, max_target)
    files = _weight_files(folder, revision, model.name)
    return Backbone(hf, text, family, model.name, low_dtype, files, is_sharded=shard is not None)


def base_sha256(model: ModelConfig) -> str | None:
    """Return the digest of a model's weights (`checkpoint_files.digest`), None if they are not downloaded yet.

    Raises UserError as `locate_checkpoint` does, and if a folder's weights are incomplete.
    """
    files = _weight_files(*locate_checkpoint(model), model.name)
    return checkpoint_files.digest(files) if files else None


def _weight_files(folder: str, revision: str | None, name: str) -> tuple[Path, ...]:
    """Return the weight files of a model that `locate_checkpoint` found; none if it is not downloaded yet."""
    path = Path(folder) if Path(folder).is_dir() else cached_folder(folder, revision)
    return () if path is None else tuple(checkpoint_files.weight_files(path, name))


def locate_checkpoint(model: ModelConfig) -> tuple[str, str | None]:
    """Return where to load a model from: a folder and None, or a hub name and its revision.

    Raises UserError if the name is unknown, or if the hub cannot be reached and its cache does not hold the model.
    """
    name = model.name
    if name in MINIATURES:
        return str(tiny.folder(MINIATURES[name])), None
    if (path := local_folder(name)) is not None:
        return str(path), None
    if not is_hub_name(name):
        miniatures = ", ".join(MINIATURES)
        raise UserError(
            f"unknown model {name!r:.200}: give a hub name (owner/name), a local folder, or one of {miniatures}"
        )
    if hub_reachable():
        return name, model.revision
    if (snapshot := cached_folder(name, model.revision)) is None:
        raise UserError(f"offline: `{name}` is not in the local cache; give a folder with --model, or --model tiny")
    return str(snapshot), None


def local_folder(name: str) -> Path | None:
    """Return the model folder that a name stands for, None if it is no path.

    Raises UserError for a path without a config.json.
    """
    try:
        path = Path(name).expanduser()
        if not (path.exists() or name.startswith((".", "/", "~"))):
            return None
        if (path / "config.json").is_file():
            return path
    except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL in it, an unknown home
        raise UserError(f"{name!r:.200} is not the name of a model or a folder ({error!s:.100})") from None
    raise UserError(f"{name} is not a model folder: it has no config.json")


def is_hub_name(name: str) -> bool:
    """Whether a name has the form of a hub name with an owner: `owner/name`."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name.count("/") == 1


def cached_folder(name: str, revision: str | None) -> Path | None:
    """Return the folder of the local hub cache that holds the checkpoint, or None."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def hub_reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers one short request, through a proxy where one is set; `timeout` in seconds.

    The hub's own client would retry for a minute without a network.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True  # an error status is an answer too
    except OSError as error:
        # The hub's own client has its own certificates; this request depends on those of the system.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


def quantization_options(quantization: str, low_dtype: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """Return the arguments of `from_pretrained` for a language model in `8bit` or `4bit`; none for `none`.

    `low_dtype`: the dtype in which 4-bit weights are multiplied, fp32 if None. Raises UserError if bitsandbytes is not
    installed.
    """
    if quantization == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization={quantization} needs bitsandbytes: pip install 'blipfit[quant]'")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTIZED)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=low_dtype or torch.float32,
            llm_int8_skip_modules=_NOT_QUANTIZED,
        )
    return {"quantization_config": config, "device_map": {"": device}}


def read_hub_config(folder: str, revision: str | None, name: str) -> dict[str, Any]:
    """Read the configuration of a folder or hub name. Raises UserError if it cannot be read or used."""
    try:
        config: dict[str, Any] = transformers.PreTrainedConfig.get_config_dict(folder, revision=revision)[0]
    except (OSError, ValueError, RecursionError) as error:
        disk_space.refuse_full_disk(error)
        raise UserError(f"{name} cannot be loaded ({first_line(error):.300}); get a complete copy") from error
    checkpoint_files.refuse_kernels(config, name)
    if config.get("model_type") == "instructblip":
        checkpoint_files.check_config(config, name)
    return config


def refuse_other_type(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError if a configuration is not that of an InstructBLIP."""
    if (model_type := config.get("model_type")) != "instructblip":
        raise UserError(f"{name} is a model of type {model_type!r:.100}; blipfit fine-tunes 'instructblip' checkpoints")


def build_on_meta(
    config: Mapping[str, Any],
    name: str,
    create: Callable[[Any], Any] = transformers.InstructBlipForConditionalGeneration,
) -> Any:
    """Create the model of a configuration on the meta device, without memory, with `create(config)`.

    Raises UserError if transformers cannot.
    """
    try:
        with quiet(), torch.device("meta"):
            parsed = transformers.InstructBlipConfig(**config)
            family_of(parsed)
            return create(parsed)
    except UserError:
        raise
    except Exception as error:  # a field of another type fails anywhere in transformers, as any class
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{name}: its config.json cannot be used ({reason:.300}); get a complete copy") from error


def load_weights(
    folder: str, revision: str | None, dtype: torch.dtype, name: str, options: Mapping[str, Any] | None = None
) -> Any:
    """Load the model with its frozen parts in `dtype` and its trainable parts in fp32.

    `folder`: a folder or a hub name. `options`: further arguments of `from_pretrained` (see `quantization_options`).
    Raises UserError if the checkpoint is of another kind, damaged or incomplete.
    """
    try:
        refuse_other_type(read_hub_config(folder, revision, name), name)
        hf, loading_info = InstructBlipForConditionalGeneration.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # so that the error below can name them; transformers' own does not
            output_loading_info=True,
            **(options or {}),
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, SafetensorError) as error:
        disk_space.refuse_full_disk(error)
        raise UserError(f"{name} cannot be loaded ({first_line(error):.300}); get a complete copy") from error
    for weight, shape, expected in loading_info["mismatched_keys"]:
        raise UserError(
            f"{name}: {weight} is {tuple(shape)} but config.json asks for {tuple(expected)}; get a current copy"
        )
    if missing := sorted(loading_info["missing_keys"]):
        # transformers would initialize them at random, with a warning at most.
        raise UserError(f"{name}: {len(missing)} weights are missing, e.g. {missing[0]}; get a complete copy")
    return hf


def family_of(config: Any) -> Family:
    """Return the family of a configuration's language model; raises UserError if it is not supported."""
    model_type = config.text_config.model_type
    if model_type == "t5":
        return "t5"
    if model_type == "llama":
        return "vicuna"
    raise UserError(
        f"language model of type {model_type!r} is not supported; blipfit supports 't5' and 'llama' (Vicuna)"
    )


def decoder_start_id(hf: Any, family: Family) -> int:
    """Return the id of T5's first decoder token; 0 for a family without a decoder of its own."""
    return hf.config.text_config.decoder_start_token_id if family == "t5" else 0


def low_precision_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return the 16-bit dtype of the language model and of autocast, or None for fp32 throughout.

    Raises UserError for a name that is no precision, and for fp16 on a CPU.
    """
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r:.100} does not exist; known: {', '.join(PRECISIONS)}")
    if precision == "fp32":
        return None
    if precision == "bf16":
        return torch.bfloat16
    if precision == "fp16":
        if device.type == "cpu":
            raise UserError("precision fp16 needs a GPU; on a CPU use fp32 or bf16")
        return torch.float16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    return None


def halve_tower(hf: Any) -> None:
    """Convert the linear layers of the ViT to `TOWER_DTYPE`, in place.

    Position embedding and layer norms stay in fp32, and so does the residual stream (see `Backbone.see`). The patch
    convolution is stored in fp32 as well, because transformers casts the embeddings to its dtype; autocast multiplies
    in 16 bit.
    """
    for module in hf.vision_model.encoder.modules():
        if isinstance(module, nn.Linear):
            module.to(TOWER_DTYPE)


def _refuse_non_finite(hf: nn.Module, name: str) -> None:
    """Raise UserError if a weight is NaN or infinite, because the model's scores would be too."""
    if weight := checkpoint_files.find_non_finite(dict(hf.named_parameters())):
        raise UserError(f"{name}: the weight {weight} is not finite (it holds NaN or infinity); get a fresh copy")


def prepare_model(hf: Any, family: Family, name: str) -> None:
    """Correct what transformers gets wrong about a loaded model, in place; raises UserError for a broken copy."""
    if family == "t5":
        _untie(hf, name)
        _use_exact_gelu(hf.language_model)
    queries = hf.query_tokens.detach()[0].float()
    if len(queries) > 1 and bool((queries == queries[0]).all()):
        raise UserError(
            f"{name}: all {len(queries)} query tokens are identical (loading with ignored mismatches zeroes them); "
            "use a copy with its own query tokens"
        )


def _untie(hf: Any, name: str) -> None:
    """Mark Flan-T5's head as untied, so that no later `tie_weights()` overwrites it with the input embedding."""
    language = hf.language_model
    if torch.equal(language.lm_head.weight, language.shared.weight):
        raise UserError(
            f"{name}: the language model's head is tied to its input embedding, Flan-T5's is not; "
            "the checkpoint was saved wrongly or lacks language_model.lm_head.weight: get a fresh copy"
        )
    for config in (hf.config.text_config, language.config, language.encoder.config, language.decoder.config):
        config.tie_word_embeddings = False
        # An untied head means T5 1.1, which does not scale the decoder's output.
        config.scale_decoder_outputs = False


def _use_exact_gelu(language: nn.Module) -> None:
    """Replace the tanh approximation of Flan-T5's checkpoint by the exact GELU, which the original code runs."""
    for module in language.modules():
        if hasattr(module, "wi_0") and hasattr(module, "act"):
            module.act = nn.GELU()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Context in which transformers shows no warnings and no progress bars; errors are still raised."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    had_progress_bar = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its class if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
