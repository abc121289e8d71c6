"""Merge an adapter into its base model and write an ordinary checkpoint, which needs neither peft nor blipfit."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blipfit import run_folder
from blipfit.adapters import load_adapter
from blipfit.model import loading, tokenizer_files
from blipfit.model.backbone import Backbone
from blipfit.recipe import Family

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_GENERATION_FILE = "generation_config.json"


def merge_adapter(hf: Any, folder: Path) -> None:
    """Merge the adapter in a folder into a loaded base model, in place.

    `hf` must be in fp32 and have no bank installed. peft merges its layers; AdaLoRA is in the folder as LoRA. Raises
    ValueError if a merged weight is NaN or infinite.
    """
    with loading.quiet():
        model = load_adapter.add_adapter(hf, folder)
        if model is not hf:
            merged = model.merge_and_unload(safe_merge=True)
            assert merged is hf, "peft has merged a copy"
    if hasattr(hf, "peft_config"):
        del hf.peft_config
    hf.requires_grad_(False)


def cast(hf: Any, dtype: torch.dtype) -> None:
    """Convert a model to a 16-bit dtype as `loading.load` does, in place; nothing for fp32.

    The language model gets the dtype, the ViT's linear layers get float16, and the parts that training changed stay in
    fp32: the Q-Former, the layer norm after the ViT, the query tokens and the projection.
    """
    if dtype != torch.float32:
        hf.language_model.to(dtype)
        loading.halve_tower(hf)


def write_checkpoint(folder: Path, backbone: Backbone, source: Path, dtype: torch.dtype) -> None:
    """Write a merged model to a new folder, in Hugging Face's format: weights, configuration, processor.

    `source`: the folder of its base model. `dtype`: what config.json names, in which transformers loads all weights.
    """
    from huggingface_hub import save_torch_state_dict

    folder.mkdir(parents=True)
    save_torch_state_dict(_select_tensors(backbone.hf), folder, metadata={"format": "pt"})
    config = run_folder.read_json(source / "config.json")
    _edit_config(config, backbone, dtype)
    run_folder.write_json(folder / "config.json", config)
    if (source / _GENERATION_FILE).is_file():
        settings = run_folder.read_json(source / _GENERATION_FILE)
        run_folder.write_json(folder / _GENERATION_FILE, settings | _token_ids(backbone))
    _write_processor(folder, backbone, source)


def _select_tensors(hf: Any) -> dict[str, Tensor]:
    """The model's tensors, each once: T5's two stacks read the same input embedding."""
    tensors, pointers = {}, set()
    for name, tensor in hf.state_dict().items():
        if tensor.data_ptr() not in pointers:
            tensors[name] = tensor.contiguous()
            pointers.add(tensor.data_ptr())
    return tensors


def _token_ids(backbone: Backbone) -> dict[str, int]:
    """The ids that end and pad a generated text; published copies disagree about them."""
    tokenizer = backbone.text.llm_tokenizer
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    return ids | ({"decoder_start_token_id": backbone.text.decoder_start} if backbone.family == "t5" else {})


def _edit_config(config: dict[str, Any], backbone: Backbone, dtype: torch.dtype) -> None:
    """Make a base model's config.json that of its merged model, as blipfit computes it, in place."""
    hf = backbone.hf
    config.pop("blipfit", None)
    config.pop("quantization_config", None)
    config["architectures"] = ["InstructBlipForConditionalGeneration"]
    config["num_query_tokens"] = hf.config.num_query_tokens
    config["image_token_index"] = hf.config.image_token_id
    for section in (config, *(config[f"{part}_config"] for part in ("vision", "qformer", "text"))):
        section.pop("torch_dtype", None)
        section["dtype"] = str(dtype).removeprefix("torch.")
    config["text_config"] |= _token_ids(backbone) | _language_settings(config["text_config"], backbone.family)


def _language_settings(text_config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """T5's settings that blipfit corrects at loading: exact GELU, a head of its own, no scaling for it."""
    if family != "t5":
        return {}
    settings: dict[str, Any] = {"tie_word_embeddings": False, "scale_decoder_outputs": False}
    if text_config.get("feed_forward_proj") == "gated-gelu":  # which transformers takes for the approximation by tanh
        settings |= {"feed_forward_proj": "gated-gelu_python", "dense_act_fn": "gelu_python"}
    return settings


def _write_processor(folder: Path, backbone: Backbone, source: Path) -> None:
    """Write the image processor and the tokenizers that blipfit reads images and texts with.

    A chat template is not written, because transformers' InstructBlipProcessor does not load one.
    """
    from transformers import InstructBlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    qformer_tokenizer, tokenizer = tokenizer_files.load_tokenizers(str(source))
    if backbone.family == "vicuna" and tokenizer("a").input_ids[0] != tokenizer.bos_token_id:
        tokenizer.add_bos_token = True  # blipfit adds it itself, whatever the copy's configuration says
    size = {"height": backbone.image_size, "width": backbone.image_size}
    queries = backbone.hf.config.num_query_tokens
    processor = InstructBlipProcessor(BlipImageProcessorPil(size=size), tokenizer, qformer_tokenizer, queries)
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
