"""The embedded miniatures: real InstructBLIP checkpoints of both families, small enough to ship, and a small CLIP.

They are three folders in Hugging Face format in `miniatures/`. `InstructBlipForConditionalGeneration` and
`InstructBlipProcessor` load `tiny-t5` and `tiny-vicuna`; `CLIPModel` and `CLIPProcessor` load `tiny-clip`. Weights are
stored in float16 and load as float32. `blipfit.pretraining.make_miniatures` trains them.
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
CLIP_TEXT_LENGTH = 64
"""The longest text that the miniature CLIP reads, in tokens."""


def folder(family: Family) -> Path:
    """Return the folder of a family's miniature, in Hugging Face format."""
    return MINIATURES / NAMES[family]


def clip_folder() -> Path:
    """Return the folder of the miniature CLIP, in Hugging Face format."""
    return MINIATURES / CLIP_NAME


def config(
    family: Family, tokenizer: PreTrainedTokenizerBase, qformer_tokenizer: PreTrainedTokenizerBase
) -> InstructBlipConfig:
    """Return the configuration of a miniature; vocabulary sizes and the id of `<image>` come from the tokenizers.

    `tokenizer`: the language model's, which must have the token `<image>`.
    """
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
            # BERT's 0.02 is for a width of 768; in a narrow model, attention would stay almost uniform for long.
            initializer_range=WIDTH**-0.5,
        ),
        text_config=text,
        num_query_tokens=QUERY_TOKENS,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        dtype="float32",
    )


def vision_config() -> InstructBlipVisionConfig:
    """Return the vision tower's configuration, shared by all miniatures: 64 patches of 8 × 8 pixels, a class token."""
    return InstructBlipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        layer_norm_eps=1e-6,
        # The published configuration has 1e-10, but its weights were not initialized with that value.
        initializer_range=0.02,
        dtype="float32",
    )


def _t5_config(vocab_size: int) -> T5Config:
    return T5Config(
        vocab_size=-(-vocab_size // 32) * 32,
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


def clip_config(vocab_size: int) -> CLIPConfig:
    """Return the miniature CLIP's configuration: the shared tower, and a text encoder.

    The last two of its ids are the start and the end token.
    """
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
            "vocab_size": vocab_size,
            "hidden_size": 96,
            "intermediate_size": 288,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CLIP_TEXT_LENGTH,
            "hidden_act": "gelu",
            "projection_dim": WIDTH,
            "bos_token_id": vocab_size - 2,
            "eos_token_id": vocab_size - 1,
            "pad_token_id": vocab_size - 1,
        },
        projection_dim=WIDTH,
        dtype="float32",
    )


def image_processor() -> BlipImageProcessorPil:
    """Return the image processor: Pillow's resizing to 64 × 64 and the published normalization."""
    return BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def processor(tokenizer: PreTrainedTokenizerBase, qformer_tokenizer: PreTrainedTokenizerBase) -> InstructBlipProcessor:
    """Return a processor with these tokenizers; it adds `<image>` to the language model's tokenizer if missing."""
    return InstructBlipProcessor(image_processor(), tokenizer, qformer_tokenizer, num_query_tokens=QUERY_TOKENS)


def build(family: Family, processor: InstructBlipProcessor, seed: int = 0) -> InstructBlipForConditionalGeneration:
    """Create a miniature with random weights that depend on the seed only; query tokens are random too, not zero."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(config(family, processor.tokenizer, processor.qformer_tokenizer))
        torch.nn.init.normal_(model.query_tokens, std=0.2)
        if family == "t5":
            untie(model)
    return model


def untie(model: InstructBlipForConditionalGeneration) -> None:
    """Give a T5 model its own `lm_head`, as Flan-T5 has; transformers 5 ties it to the input embedding."""
    language_model = model.language_model
    shared = language_model.shared.weight
    if language_model.lm_head.weight is shared:
        language_model.lm_head.weight = torch.nn.Parameter(torch.empty_like(shared))
        torch.nn.init.normal_(language_model.lm_head.weight, std=shared.shape[1] ** -0.5)
    for part in (language_model, language_model.encoder, language_model.decoder):
        part.config.tie_word_embeddings = False
    model.config.text_config.tie_word_embeddings = False


def save(model: PreTrainedModel, folder: Path, metadata: dict[str, str] | None = None) -> None:
    """Write `config.json` and `model.safetensors`; weights are stored in float16 and load as float32.

    `metadata` is written into both files: as `blipfit` in the configuration, and into the header of the weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    metadata = dict(metadata or {})
    settings: dict[str, Any] = model.config.to_dict()
    settings["dtype"] = "float32"
    settings["architectures"] = [type(model).__name__]
    settings["blipfit"] = metadata
    tensors = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    duplicates = {"language_model.encoder.embed_tokens.weight", "language_model.decoder.embed_tokens.weight"}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in duplicates}
    save_file(tensors, folder / "model.safetensors.part", {"format": "pt", **metadata})
    os.replace(folder / "model.safetensors.part", folder / "model.safetensors")
    text = json.dumps(settings, indent=2, sort_keys=True) + "\n"
    (folder / "config.json.part").write_text(text, encoding="utf-8")
    os.replace(folder / "config.json.part", folder / "config.json")


def save_processor(processor: InstructBlipProcessor | CLIPProcessor, folder: Path) -> None:
    """Write the tokenizers and the processor, with a `preprocessor_config.json` as the hub's copies have it."""
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)


def clip_processor(tokenizer: PreTrainedTokenizerBase) -> CLIPProcessor:
    """Return the miniature CLIP's processor: resize to 64 × 64 without cropping, like the InstructBLIP miniatures."""
    image_processor = CLIPImageProcessorPil(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, do_center_crop=False, default_to_square=True
    )
    return CLIPProcessor(image_processor, tokenizer)


def build_clip(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> CLIPModel:
    """Create a miniature CLIP with random weights that depend on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(clip_config(len(tokenizer)))
