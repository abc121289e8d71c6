"""The embedded miniatures: real InstructBLIP checkpoints of both families, small enough to ship, and a small CLIP.

Three folders in Hugging Face format lie beside this file. `InstructBlipForConditionalGeneration.from_pretrained`
and `InstructBlipProcessor.from_pretrained` read `tiny-t5` and `tiny-vicuna`, `CLIPModel` and `CLIPProcessor` read
`tiny-clip`. Weights are stored in float16 and load as float32. `blipfit.pretraining.miniatures` makes them.
"""

import json
import os
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    T5Config,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

Family = Literal["t5", "vicuna"]

NAMES: dict[Family, str] = {"t5": "tiny-t5", "vicuna": "tiny-vicuna"}
CLIP_NAME = "tiny-clip"
MINIATURES = Path(__file__).parent / "miniatures"

IMAGE_SIZE = 64
PATCH_SIZE = 8
QUERY_TOKENS = 16
WIDTH = 128
# The longest text that the miniature CLIP reads, in tokens.
CLIP_TEXT_LENGTH = 64


def folder(family: Family) -> Path:
    """The shipped checkpoint of a family, in Hugging Face format."""
    return MINIATURES / NAMES[family]


def clip_folder() -> Path:
    """The shipped miniature CLIP, in Hugging Face format."""
    return MINIATURES / CLIP_NAME


def config(
    family: Family, tokenizer: PreTrainedTokenizerBase, qformer_tokenizer: PreTrainedTokenizerBase
) -> InstructBlipConfig:
    """The shape of a miniature; the tokenizers give the vocabularies and `<image>`'s id (they must hold it)."""
    text = _t5_config(len(tokenizer)) if family == "t5" else _llama_config(tokenizer)
    return InstructBlipConfig(
        vision_config=vision_config(),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(qformer_tokenizer),
            hidden_size=WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            max_position_embeddings=192,
            cross_attention_frequency=2,
            encoder_hidden_size=WIDTH,
            # BERT's 0.02 suits a width of 768; so narrow a model would attend evenly to everything for long.
            initializer_range=WIDTH**-0.5,
        ),
        text_config=text,
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        dtype="float32",
    )


def vision_config() -> InstructBlipVisionConfig:
    """The tower that both families and the miniature CLIP share: 64 patches of 8 × 8 pixels and a class token."""
    return InstructBlipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layer_norm_eps=1e-6,
        # The published configuration says 1e-10 because its weights were never drawn from it.
        initializer_range=0.02,
        dtype="float32",
    )


def _t5_config(vocabulary: int) -> T5Config:
    return T5Config(
        vocab_size=-(-vocabulary // 32) * 32,
        d_model=WIDTH,
        d_kv=32,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
        dtype="float32",
    )


def _llama_config(tokenizer: PreTrainedTokenizerBase) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=5 * WIDTH // 2,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-6,
        initializer_range=WIDTH**-0.5 / 2,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def clip_config(vocabulary: int) -> CLIPConfig:
    """The miniature CLIP: the shared tower and a text encoder whose last two ids begin and end a text."""
    tower = vision_config()
    return CLIPConfig(
        vision_config={
            "hidden_size": tower.hidden_size,
            "intermediate_size": tower.intermediate_size,
            "num_hidden_layers": tower.num_hidden_layers,
            "num_attention_heads": tower.num_attention_heads,
            "image_size": tower.image_size,
            "patch_size": tower.patch_size,
            "hidden_act": tower.hidden_act,
            "layer_norm_eps": tower.layer_norm_eps,
            "projection_dim": WIDTH,
        },
        text_config={
            "vocab_size": vocabulary,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CLIP_TEXT_LENGTH,
            "hidden_act": "gelu",
            "projection_dim": WIDTH,
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": vocabulary - 1,
        },
        projection_dim=WIDTH,
        dtype="float32",
    )


def image_processor() -> BlipImageProcessorPil:
    """Resizing to 64 × 64 and the published normalization, through Pillow."""
    return BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def processor(tokenizer: PreTrainedTokenizerBase, qformer_tokenizer: PreTrainedTokenizerBase) -> InstructBlipProcessor:
    """A processor over these tokenizers; it adds `<image>` to the first where that is missing."""
    return InstructBlipProcessor(image_processor(), tokenizer, qformer_tokenizer, num_query_tokens=QUERY_TOKENS)


def build(family: Family, parts: InstructBlipProcessor, seed: int = 0) -> InstructBlipForConditionalGeneration:
    """A miniature with random weights, the same for the same seed; the query tokens are drawn too, not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(config(family, parts.tokenizer, parts.qformer_tokenizer))
        torch.nn.init.normal_(model.query_tokens, std=0.2)
        if family == "t5":
            untie(model)
    return model


def untie(model: InstructBlipForConditionalGeneration) -> None:
    """Give a T5 its own `lm_head`, as Flan-T5 has: transformers 5 builds it on the input embedding."""
    language_model = model.language_model
    shared = language_model.shared.weight
    if language_model.lm_head.weight is shared:
        language_model.lm_head.weight = torch.nn.Parameter(torch.empty_like(shared))
        torch.nn.init.normal_(language_model.lm_head.weight, std=shared.shape[1] ** -0.5)
    for part in (language_model, language_model.encoder, language_model.decoder):
        part.config.tie_word_embeddings = False
    model.config.text_config.tie_word_embeddings = False


def save(model: PreTrainedModel, target: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `config.json` and `model.safetensors` (float16; the configuration says float32, so it loads as that).

    `metadata` goes into both files: under `blipfit` in the configuration and into the weights' header.
    """
    target.mkdir(parents=True, exist_ok=True)
    metadata = dict(metadata or {})
    settings: dict[str, Any] = model.config.to_dict()
    settings["dtype"] = "float32"
    settings["architectures"] = [type(model).__name__]
    settings["blipfit"] = metadata
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    duplicates = {"language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in duplicates}
    save_file(tensors, target / "model.safetensors.part", {"format": "pt", **metadata})
    os.replace(target / "model.safetensors.part", target / "model.safetensors")
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (target / "config.json.part").write_text(text, encoding="utf-8")
    os.replace(target / "config.json.part", target / "config.json")


def save_processor(parts: InstructBlipProcessor | CLIPProcessor, target: Path) -> None:
    """Write the tokenizers and the processor, with `preprocessor_config.json` as the hub's copies have it."""
    parts.save_pretrained(target)
    parts.image_processor.save_pretrained(target)


def clip_processor(tokenizer: PreTrainedTokenizerBase) -> CLIPProcessor:
    """The miniature CLIP's processor: resize to 64 × 64 without cropping, like the InstructBLIP miniatures."""
    images = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, default_to_square=True
    )
    return CLIPProcessor(images, tokenizer)


def build_clip(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> CLIPModel:
    """A miniature CLIP with random weights, the same for the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(clip_config(len(tokenizer)))
