"""Small random InstructBLIP checkpoints in the hub's format, written by the tests for the tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    BertTokenizer,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    InstructBlipProcessor,
    InstructBlipQFormerConfig,
    InstructBlipVisionConfig,
    LlamaConfig,
    LlamaTokenizer,
    T5Config,
    T5Tokenizer,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blipfit.model import loading, tiny, tokenizer_files
from blipfit.model.backbone import Backbone
from blipfit.recipe import ModelConfig

FAMILIES = ("t5", "vicuna")
WIDTH, IMAGE_SIZE, QUERY_TOKENS = 32, 32, 4
TOKENIZERS = Path(__file__).parents[1].parent / "shared" / "tokenizers"


def own_tokenizers(family: str) -> tuple[Any, Any]:
    """The language model's and the Q-Former's tokenizer of the embedded miniature."""
    folder = tiny.folder(family)
    return AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(folder / "qformer_tokenizer")


def real_tokenizers(family: str) -> tuple[Any, Any]:
    """The published vocabularies with the settings of the hub's InstructBLIP copies."""
    if family == "t5":
        language = T5Tokenizer.from_pretrained(TOKENIZERS / "t5")
    else:
        stop = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "</s>")
        language = LlamaTokenizer.from_pretrained(TOKENIZERS / "llama", **stop, pad_token="[PAD]")
        tokenizer_files.follow_sentencepiece(language, TOKENIZERS / "llama" / "tokenizer.model")
    language.add_tokens(["<image>"], special_tokens=True)
    qformer = BertTokenizer.from_pretrained(TOKENIZERS / "bert", bos_token="[DEC]", truncation_side="left")
    return language, qformer


def write(
    folder: Path,
    family: str,
    tokenizers: tuple[Any, Any],
    change: Callable[[InstructBlipForConditionalGeneration], Any] = lambda model: None,
    seed: int = 0,
) -> Path:
    """Write a checkpoint of two layers a part; `change` may spoil the model first."""
    language, qformer = tokenizers
    parts = InstructBlipProcessor(
        BlipImageProcessorPil(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        language,
        qformer,
        num_query_tokens=QUERY_TOKENS,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = InstructBlipForConditionalGeneration(_config(family, language, qformer))
        _draw(model, family)
    change(model)
    tiny.save(model, folder)
    tiny.save_processor(parts, folder)
    return folder


def load(folder: Path, **options: Any) -> Backbone:
    """The checkpoint of a folder, through the one loading place."""
    return loading.load(ModelConfig(name=str(folder)), **options)


def _draw(model: InstructBlipForConditionalGeneration, family: str) -> None:
    """Weights that matter, every one: the library's own start has zero biases and next to no signal."""
    if family == "t5":
        tiny.untie(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
        elif isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight, mean=1, std=0.1)
            nn.init.normal_(module.bias, std=0.1)
    nn.init.normal_(model.query_tokens, std=0.02)


def _config(family: str, language: Any, qformer: Any) -> InstructBlipConfig:
    return InstructBlipConfig(
        vision_config=InstructBlipVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=2 * WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=16,
            initializer_range=0.02,
        ),
        qformer_config=InstructBlipQFormerConfig(
            vocab_size=len(qformer),
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=2 * WIDTH,
            max_position_embeddings=160,
            cross_attention_frequency=2,
            encoder_hidden_size=WIDTH,
        ),
        text_config=_t5(language) if family == "t5" else _llama(language),
        num_query_tokens=QUERY_TOKENS,
        image_token_index=language.convert_tokens_to_ids("<image>"),
    )


def _t5(tokenizer: Any) -> T5Config:
    return T5Config(
        vocab_size=-(-len(tokenizer) // 32) * 32,
        d_model=WIDTH,
        d_kv=8,
        d_ff=2 * WIDTH,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )


def _llama(tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
