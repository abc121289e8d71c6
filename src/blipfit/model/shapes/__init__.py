"""Models without weights, for their shapes: blipfit ships the published configurations, so nothing is downloaded."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from blipfit.recipe import Family

_FOLDER = Path(__file__).parent
"""Folder of the published configurations."""
PUBLISHED = {f"Salesforce/{file.stem}": file for file in sorted(_FOLDER.glob("*.json"))}
"""Hub name → configuration file."""


def on_meta(name: str) -> Any:
    """Create a model on the meta device, which has modules and shapes but no memory.

    `name`: a published model, a miniature, a local folder, or another hub name. Raises UserError if there is no such
    model, or if its configuration cannot be used.
    """
    from blipfit.model import checkpoint_files, loading

    if name in PUBLISHED:
        return _build(PUBLISHED[name].read_text(encoding="utf-8"), name)
    from blipfit.recipe import ModelConfig

    folder, revision = loading.locate_checkpoint(ModelConfig(name=name))
    if Path(folder).is_dir():
        config = checkpoint_files.read_config(Path(folder), name)
    else:
        config = loading.read_hub_config(folder, revision, name)
    return _build(json.dumps(config, sort_keys=True), name)


@lru_cache(maxsize=2)
def _build(config: str, name: str) -> Any:
    """Build a configuration (JSON); the text is the key, because a relative name may stand for several folders."""
    from blipfit.model import loading

    values = json.loads(config)
    loading.refuse_other_type(values, name)
    return loading.build_on_meta(values, name, initialize)


def from_config(config: Any) -> Any:
    """Create the model of an `InstructBlipConfig` on the meta device."""
    from blipfit.model import loading

    with torch.device("meta"), loading.quiet():
        return initialize(config)


def initialize(config: Any) -> Any:
    """Create a model with transformers' initial weights, on torch's current device and in its default dtype."""
    from transformers import InstructBlipForConditionalGeneration

    from blipfit.model import loading

    model = InstructBlipForConditionalGeneration(config)
    if loading.family_of(config) == "t5":
        # Flan-T5's head is a separate matrix; transformers ties it to the input embedding.
        language: Any = model.language_model
        language.lm_head.weight = torch.nn.Parameter(torch.zeros_like(language.shared.weight))
    return model


def family(name: str) -> Family:
    """Return the family of a model's language model; raises UserError if it is unknown or not supported."""
    from blipfit.model import loading

    return loading.family_of(on_meta(name).config)
