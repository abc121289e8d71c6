"""CLIP score (Hessel et al., 2021, in the form that is used today): 100 × max(cosine, 0) of image and text, by a CLIP.

Shapes: B pairs of a batch, D width of CLIP's common space.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from blipfit.data.images import open_image
from blipfit.errors import UserError
from blipfit.model import loading, tiny

DEFAULT = "openai/clip-vit-base-patch32"
KNOWN = (DEFAULT, "openai/clip-vit-large-patch14", tiny.CLIP_NAME)


@dataclass(frozen=True, slots=True)
class ClipScores:
    """Scores of pairs in their order, each 0 to 100, and how many texts were longer than the model reads."""

    values: tuple[float, ...]
    cut: int


class ClipJudge:
    """A CLIP model with its tokenizer and image processor, in eval mode, fp32."""

    def __init__(self, name: str, model: Any, tokenizer: Any, processor: Any):
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.processor = processor

    @property
    def text_length(self) -> int:
        """The longest text the model reads, in tokens, its beginning and end included (77 for OpenAI's)."""
        return self.model.config.text_config.max_position_embeddings

    def score(self, images: Sequence[Path | Image.Image], texts: Sequence[str], batch_size: int = 32) -> ClipScores:
        """Score each image with its own text; a longer text is cut to what the model reads, and counted."""
        values: list[float] = []
        cut = 0
        for batch in _batches(list(zip(images, texts, strict=True)), batch_size):
            ids, longer = self._tokens([text for _, text in batch])
            cut += longer
            values += self._cosines(self._pixels([image for image, _ in batch]), ids).tolist()
        return ClipScores(tuple(100 * max(value, 0.0) for value in values), cut)

    def _tokens(self, texts: list[str]) -> tuple[Tensor, int]:
        """Token ids with the end-of-text token after each text, `B × T`; and how many texts were cut."""
        rows = self.tokenizer(texts, truncation=False, verbose=False).input_ids
        longer = sum(len(row) > self.text_length for row in rows)
        ids = self.tokenizer(
            texts, truncation=True, max_length=self.text_length, padding=True, return_tensors="pt"
        ).input_ids
        return ids, longer

    def _pixels(self, images: list[Path | Image.Image]) -> Tensor:
        opened = [open_image(image) if isinstance(image, Path) else image for image in images]
        return self.processor(opened, return_tensors="pt").pixel_values

    @torch.no_grad()
    def _cosines(self, pixels: Tensor, ids: Tensor) -> Tensor:
        device = self.model.device
        # No attention mask: attention is causal and the text is read at its end token, so what follows is not seen.
        texts = self.model.get_text_features(input_ids=ids.to(device)).pooler_output
        images = self.model.get_image_features(pixel_values=pixels.to(device)).pooler_output
        return torch.nn.functional.cosine_similarity(images, texts).float().cpu()


def load(name: str = DEFAULT, device: torch.device | str = "cpu") -> ClipJudge:
    """Load a CLIP by its hub name, from a local folder in transformers' format, or the embedded `tiny-clip`."""
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
    return ClipJudge(name, model.eval().to(device), tokenizer, processor)


def _check_end(name: str, config: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer whose end token is not the model's: every text would be read at its first token."""
    # OpenAI's configurations say 2, which transformers takes for "the highest id".
    end = config.vocab_size - 1 if config.eos_token_id == 2 else config.eos_token_id
    if tokenizer.eos_token_id != end:
        raise UserError(
            f"{name}: its tokenizer ends a text with id {tokenizer.eos_token_id}, the model reads it at id {end}; "
            "the tokenizer files belong to another model, get a fresh copy"
        )


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


def _batches(pairs: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(pairs), size):
        yield pairs[start : start + size]
