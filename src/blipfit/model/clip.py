"""Loading a CLIP to judge with: by hub name, from a folder, or the embedded miniature, with the guards it needs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from blipfit.errors import UserError
from blipfit.model import loading, tiny

DEFAULT = "openai/clip-vit-base-patch32"
KNOWN = (DEFAULT, "openai/clip-vit-large-patch14", tiny.CLIP_NAME)


@dataclass(frozen=True, slots=True)
class Clip:
    """A CLIP model in eval mode and fp32, its tokenizer, and its Pillow image processor."""

    name: str
    model: Any
    tokenizer: Any
    processor: Any

    @property
    def text_length(self) -> int:
        """The longest text the model reads, in tokens, beginning and end included (77 for OpenAI's)."""
        return self.model.config.text_config.max_position_embeddings


def load(name: str = DEFAULT, device: torch.device | str = "cpu") -> Clip:
    """Load a CLIP by its hub name, from a local folder in transformers' format, or `tiny-clip`.

    UserError where it cannot be had, is another kind of model, lacks weights, or has another model's tokenizer.
    """
    from transformers import AutoTokenizer, CLIPModel, PreTrainedConfig
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = locate(name)
    try:
        with loading.quiet():
            kind = PreTrainedConfig.get_config_dict(folder)[0].get("model_type")
            if kind != "clip":
                raise UserError(f"{name} is a model of type {kind!r}; the CLIP score needs one of type 'clip'")
            model, loaded = CLIPModel.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(folder)
            processor = CLIPImageProcessorPil.from_pretrained(folder)
    except (OSError, ValueError, RuntimeError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{name} cannot be loaded ({first}); get a whole copy") from error
    if absent := sorted(loaded["missing_keys"]):
        # transformers would draw them at random, and the scores would look like scores.
        raise UserError(f"{name}: {len(absent)} weights are missing, e.g. {absent[0]}; get a whole copy")
    _check_end(name, model.config.text_config, tokenizer)
    return Clip(name, model.eval().to(device), tokenizer, processor)


def locate(name: str) -> str:
    """Where to load from: a folder, or a hub name; offline and absent is said at once."""
    if name == tiny.CLIP_NAME:
        return str(tiny.clip_folder())
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")):
        if not (path / "config.json").is_file():
            raise UserError(f"{name} is not a model folder: it has no config.json")
        return str(path)
    if name.count("/") != 1:
        raise UserError(f"unknown CLIP {name!r}: give a hub name, a local folder, or one of {', '.join(KNOWN)}")
    if loading.hub_reachable():
        return name
    if (snapshot := loading.cached(name, None)) is None:
        raise UserError(f"offline: `{name}` is not in the local cache; give a folder with a CLIP, or {tiny.CLIP_NAME}")
    return str(snapshot)


def _check_end(name: str, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end token is not the model's: every text would be read at its first token."""
    # OpenAI's configurations say 2, which transformers takes for "the highest id".
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise UserError(
            f"{name}: its tokenizer ends a text with id {tokenizer.eos_token_id}, the model reads it at id {end}; "
            "the tokenizer files belong to another model, get a fresh copy"
        )
