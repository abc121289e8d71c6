"""The one place that calls `from_pretrained` on InstructBLIP, with the guards that loading needs.

Every guard stands for a way in which a model was silently wrong; docs/footguns.md tells each story.
"""

import contextlib
import importlib.util
import os
import ssl
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from blipfit.data.batches import TextEncoder
from blipfit.errors import UserError
from blipfit.model import tiny
from blipfit.model.backbone import Backbone
from blipfit.recipe import Family, ModelConfig

_MINIATURES: dict[str, Family] = {name: family for family, name in tiny.NAMES.items()}

# Token ids of a known text: a tokenizer of the wrong class has the right vocabulary and other ids.
_KNOWN_TEXT = "Question: Which is (b) the barn owl?"
_KNOWN_IDS: dict[tuple[str, int], list[int]] = {
    ("t5", 32100): [11860, 10, 4073, 19, 41, 115, 61, 8, 13754, 3, 2381, 40, 58],
    ("vicuna", 32000): [894, 29901, 8449, 338, 313, 29890, 29897, 278, 2594, 29876, 8152, 29880, 29973],
    ("bert", 30522): [3160, 1024, 2029, 2003, 1006, 1038, 1007, 1996, 8659, 13547, 1029],
}


def load(
    model: ModelConfig,
    precision: str = "auto",
    device: torch.device | str = "cpu",
    max_text: int = 128,
    max_target: int = 256,
) -> Backbone:
    """Load a checkpoint as a frozen Backbone in eval mode.

    `precision`: see `TrainingConfig.precision`. The Q-Former, its layer norm, the query tokens and the projection stay
    fp32; the ViT and the language model take the 16-bit type. Raises UserError where the checkpoint cannot be had or
    is one of the known broken copies.
    """
    device = torch.device(device)
    folder, revision = locate(model)
    low = low_precision(precision, device)
    with quiet():
        hf = weights(folder, revision, low or torch.float32, model.name, quantized(model.quantization, low, device))
        qformer_tokenizer, tokenizer = tokenizers(folder, revision)
    family = family_of(hf.config)
    prepare(hf, family, model.name)
    if max_text > (positions := hf.config.qformer_config.max_position_embeddings):
        raise UserError(
            f"{model.name}: the Q-Former reads at most {positions} tokens; lower training.max_text_tokens={max_text}"
        )
    hf.requires_grad_(False).eval()
    if model.quantization == "none":  # a quantized model was loaded where it stays
        hf.to(device)
    check_tokenizers(hf, family, qformer_tokenizer, tokenizer, model.name)
    text = TextEncoder(qformer_tokenizer, tokenizer, family, decoder_start(hf, family), max_text, max_target)
    return Backbone(hf, text, family, model.name, autocast=low)


def locate(model: ModelConfig) -> tuple[str, str | None]:
    """Where to load from: a folder, or a hub name with its revision; offline and absent is said at once."""
    name = model.name
    if name in _MINIATURES:
        return str(tiny.folder(_MINIATURES[name])), None
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model folder: it has no config.json")
        return str(path), None
    if name.count("/") != 1:
        known = ", ".join(_MINIATURES)
        raise UserError(f"unknown model {name!r}: give a hub name (owner/name), a local folder, or one of {known}")
    if hub_reachable():
        return name, model.revision
    if (snapshot := cached(name, model.revision)) is None:
        raise UserError(f"offline: `{name}` is not in the local cache; give a folder with --model, or --model tiny")
    return str(snapshot), None


def cached(name: str, revision: str | None) -> Path | None:
    """The folder of the local hub cache that holds the checkpoint, if any."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(name, "config.json", revision=revision)
    return Path(config).parent if isinstance(config, str) else None


def hub_reachable(timeout: float = 3.0) -> bool:
    """One short request to the hub, through the proxy where there is one, instead of a minute of retries."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=timeout).close()
    except urllib.error.HTTPError:
        return True  # it answered
    except OSError as error:
        # The hub's own client brings its certificates; this one depends on the system's.
        return isinstance(getattr(error, "reason", None), ssl.SSLError)
    return True


# What quantization leaves as it is: all but the layers inside the language model.
_NOT_QUANTISED = ["vision_model", "qformer", "language_projection", "lm_head"]


def quantized(how: str, low: torch.dtype | None, device: torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a language model in 8 or 4 bit; none for `none`."""
    if how == "none":
        return {}
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"model.quantization={how} needs bitsandbytes: pip install 'blipfit[quant]'")
    from transformers import BitsAndBytesConfig

    if how == "8bit":
        chosen = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=_NOT_QUANTISED)
    else:
        chosen = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=low or torch.float32,
            llm_int8_skip_modules=_NOT_QUANTISED,
        )
    return {"quantization_config": chosen, "device_map": {"": device}}


def weights(
    folder: str, revision: str | None, dtype: torch.dtype, name: str, options: Mapping[str, Any] | None = None
) -> Any:
    """The model with all its weights, of type `dtype` where they stay frozen and fp32 where they may be trained.

    `options` are passed to `from_pretrained` (see `quantized`). UserError where the copy is of another kind, damaged
    or not whole.
    """
    from transformers import InstructBlipForConditionalGeneration, PreTrainedConfig

    class Loaded(InstructBlipForConditionalGeneration):
        # transformers 5 ignores a type for each part; this is how it keeps some modules out of the cast.
        _keep_in_fp32_modules_strict = ("query_tokens", "qformer", "language_projection", "post_layernorm")

    try:
        kind = PreTrainedConfig.get_config_dict(folder, revision=revision)[0].get("model_type")
        if kind != "instructblip":
            raise UserError(f"{name} is a model of type {kind!r}; blipfit fine-tunes 'instructblip' checkpoints")
        hf, loaded = Loaded.from_pretrained(
            folder,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # to name them below; transformers' own error does not
            output_loading_info=True,
            **(options or {}),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{name} cannot be loaded ({_first_line(error)}); get a whole copy") from error
    for weight, there, wanted in loaded["mismatched_keys"]:
        raise UserError(
            f"{name}: {weight} is {tuple(there)} but config.json asks for {tuple(wanted)}; get a current copy"
        )
    if absent := sorted(loaded["missing_keys"]):
        # transformers would draw them at random, with a warning at most.
        raise UserError(f"{name}: {len(absent)} weights are missing, e.g. {absent[0]}; get a whole copy")
    hf.__class__ = InstructBlipForConditionalGeneration
    return hf


def tokenizers(folder: str, revision: str | None = None) -> tuple[Any, Any]:
    """The Q-Former's and the language model's tokenizer of a checkpoint."""
    from transformers import AutoTokenizer

    def read(where: str) -> Any:
        try:
            return AutoTokenizer.from_pretrained(folder, subfolder=where, revision=revision)
        except (
            Exception
        ) as error:  # what damaged files raise has no common class, and tokenizers raises Exception itself
            raise UserError(
                f"{folder}: its tokenizer{where and f' in {where}/'} cannot be loaded ({_first_line(error)}); "
                "get a whole copy"
            ) from error

    return read("qformer_tokenizer"), read("")


def family_of(config: Any) -> Family:
    kind = config.text_config.model_type
    if kind == "t5":
        return "t5"
    if kind == "llama":
        return "vicuna"
    raise UserError(f"language model of type {kind!r} is not supported; blipfit knows t5 and llama (Vicuna)")


def decoder_start(hf: Any, family: Family) -> int:
    return hf.config.text_config.decoder_start_token_id if family == "t5" else 0


def low_precision(precision: str, device: torch.device) -> torch.dtype | None:
    """The 16-bit type of the frozen parts and of autocast, or None for fp32 throughout."""
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


def prepare(hf: Any, family: Family, name: str) -> None:
    """Put a freshly loaded model right, or refuse it."""
    if family == "t5":
        _untie(hf, name)
        _exact_gelu(hf.language_model)
    queries = hf.query_tokens.detach()[0].float()
    if len(queries) > 1 and bool((queries == queries[0]).all()):
        raise UserError(
            f"{name}: all {len(queries)} query tokens are identical (loading with ignored mismatches zeroes them); "
            "use a copy with its own query tokens"
        )


def _untie(hf: Any, name: str) -> None:
    """Flan-T5 has a head of its own: keep every later tie_weights() from overwriting it with the input embedding."""
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


def _exact_gelu(language: nn.Module) -> None:
    """The original runs Flan-T5's gate with the exact GELU, not with the checkpoint's tanh approximation."""
    for module in language.modules():
        if hasattr(module, "wi_0") and hasattr(module, "act"):
            module.act = nn.GELU()


def check_tokenizers(hf: Any, family: Family, qformer: Any, language: Any, name: str) -> None:
    """Refuse tokenizers that do not fit the weights."""
    for what, tokenizer, rows in (
        ("Q-Former", qformer, hf.config.qformer_config.vocab_size),
        ("language model", language, hf.config.text_config.vocab_size),
    ):
        if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= rows:
            raise UserError(f"{name}: the {what}'s tokenizer has no usable pad token; get a current copy")
        highest = max(tokenizer("(a) yes").input_ids)
        if highest >= rows:
            raise UserError(f"{name}: the {what}'s tokenizer has ids beyond its {rows} embeddings; get a current copy")
    if family == "vicuna" and language.bos_token != "</s>":
        raise UserError(
            f"{name}: BOS is {language.bos_token!r}, the InstructBLIP Vicuna checkpoints use '</s>'; "
            "get the current hub copy (old ones also lack <image> and num_query_tokens)"
        )
    for kind, tokenizer in ((family, language), ("bert", qformer)):
        expected = _KNOWN_IDS.get((kind, tokenizer.vocab_size))
        found = tokenizer(_KNOWN_TEXT, add_special_tokens=False).input_ids
        if tokenizer.unk_token_id in found:
            # Without its files, transformers makes a tokenizer of a handful of words and says nothing.
            raise UserError(f"{name}: the {kind} tokenizer does not know plain English; get a copy with its files")
        if expected is not None and found != expected:
            raise UserError(
                f"{name}: the {kind} tokenizer gives other ids than the original for a known text "
                f"({found[:6]}… instead of {expected[:6]}…); its tokenizer files are of another class, get a fresh copy"
            )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' loading chatter off a user's first screen; errors still come through."""
    from transformers.utils import logging as chatter

    verbosity = chatter.get_verbosity()
    bars = chatter.is_progress_bar_enabled()
    chatter.set_verbosity_error()
    chatter.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        chatter.set_verbosity(verbosity)
        if bars:
            chatter.enable_progress_bar()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
