"""The published models without weights: their configurations ship with blipfit, so their shapes need no download."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from blipfit.recipe import Family

_FOLDER = Path(__file__).parent
PUBLISHED = {f"Salesforce/{file.stem}": file for file in sorted(_FOLDER.glob("*.json"))}


@lru_cache(maxsize=2)
def on_meta(name: str) -> Any:
    """The model of a published name or of a local folder on the meta device: modules and shapes, no memory."""
    from transformers import InstructBlipConfig

    from blipfit.model import loading

    if name in PUBLISHED:
        config = InstructBlipConfig(**json.loads(PUBLISHED[name].read_text(encoding="utf-8")))
    else:
        from blipfit.recipe import ModelConfig

        folder, revision = loading.locate(ModelConfig(name=name))
        config = InstructBlipConfig.from_pretrained(folder, revision=revision)
    return of_config(config)


def of_config(config: Any) -> Any:
    """The model of a configuration on the meta device."""
    from blipfit.model import loading

    with torch.device("meta"), loading.quiet():
        return untrained(config)


def untrained(config: Any) -> Any:
    """The model of a configuration as transformers begins it, on torch's current device and in its default type."""
    from transformers import InstructBlipForConditionalGeneration

    from blipfit.model import loading

    model = InstructBlipForConditionalGeneration(config)
    if loading.family_of(config) == "t5":
        # Flan-T5's head is a matrix of its own; transformers builds it on the input embedding.
        language: Any = model.language_model
        language.lm_head.weight = torch.nn.Parameter(torch.zeros_like(language.shared.weight))
    return model


def family(name: str) -> Family:
    """The language-model family of a model's configuration."""
    from blipfit.model import loading

    return loading.family_of(on_meta(name).config)
