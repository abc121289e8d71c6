"""Load a CLIP model for the CLIP score: by hub name, from a folder, or the embedded miniature, with checks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blipfit.errors import UserError
from blipfit.model import checkpoint_files, loading, tiny

DEFAULT_NAME = "openai/clip-vit-base-patch32"
KNOWN_NAMES = (DEFAULT_NAME, "openai/clip-vit-large-patch14", tiny.CLIP_NAME)


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP model in eval mode and fp32, its tokenizer, and its Pillow image processor."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @property
    def text_length(self) -> int:
        """The longest text that the model reads, in tokens with start and end token (77 for OpenAI's models)."""
        return self.model.config.text_config.max_position_embeddings


def load(name: str = DEFAULT_NAME, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP by its hub name, from a local folder in transformers' format, or `tiny-clip`.

    Raises UserError if it is not available, cannot be read, is no CLIP, has missing or non-finite weights, or has
    another model's tokenizer.
    """
    from transformers import AutoTokenizer, CLIPModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = locate_clip(name)
    if Path(folder).is_dir():
        checkpoint_files.check(Path(folder), name)
    try:
        with loading.quiet():
            model_type = loading.read_hub_config(folder, None, name).get("model_type")
            if model_type != "clip":
                raise UserError(f"{name} is a model of type {model_type!r}; the CLIP score needs one of type 'clip'")
            model, loading_info = CLIPModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
            processor = CLIPImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"{name} cannot be loaded ({loading.first_line(error)}); get a complete copy") from error
    if missing := sorted(loading_info["missing_keys"]):
        # transformers would initialize them at random, and nothing would look wrong about the scores.
        raise UserError(f"{name}: {len(missing)} weights are missing, e.g. {missing[0]}; get a complete copy")
    if weight := checkpoint_files.find_non_finite(dict(model.named_parameters())):
        raise UserError(f"{name}: the weight {weight} is not finite (it holds NaN or infinity); get a fresh copy")
    _check_end_token(name, model.config.text_config, tokenizer)
    return Clip(name, model.eval().to(device), tokenizer, processor)


def locate_clip(name: str) -> str:
    """Return where to load a CLIP from: a folder or a hub name.

    Raises UserError if the name is unknown, or if the hub cannot be reached and its cache does not hold the model.
    """
    if name == tiny.CLIP_NAME:
        return str(tiny.clip_folder())
    if (path := loading.local_folder(name)) is not None:
        return str(path)
    if not loading.is_hub_name(name):
        raise UserError(
            f"unknown CLIP {name!r:.200}: give a hub name, a local folder, or one of {', '.join(KNOWN_NAMES)}"
        )
    if loading.hub_reachable():
        return name
    if (snapshot := loading.cached_folder(name, None)) is None:
        raise UserError(f"offline: `{name}` is not in the local cache; give a folder with a CLIP, or {tiny.CLIP_NAME}")
    return str(snapshot)


def _check_end_token(name: str, config: Any, tokenizer: Any) -> None:
    """Raise UserError if tokenizer and model have different end tokens: then all texts would get the same embedding."""
    # OpenAI's configurations have 2 as the end token, which transformers reads as "the highest id".
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise UserError(
            f"{name}: its tokenizer ends a text with id {tokenizer.eos_token_id}, the model reads it at id {end}; "
            "the tokenizer files belong to another model, get a fresh copy"
        )
