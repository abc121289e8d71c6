"""Load this adapter completely with transformers and peft; blipfit is not needed.

from load_adapter import load
model = load()  # on the base model that it was trained on; or load("folder/of/the/base/model")
"""

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import InstructBlipConfig, InstructBlipForConditionalGeneration

FOLDER = Path(__file__).parent
NOTICE = "peft_alone_loads_a_part_only__see_load_adapter_py"
"""A key in adapter_config.json that peft does not know and therefore warns of, by its name."""


def load(base: str | None = None, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Load the base model with this adapter, in eval mode.

    `base`: its hub name or folder; by default the one that the adapter was trained on. `options`: of `from_pretrained`.
    """
    if base is None:
        with safe_open(FOLDER / "trained.safetensors", "pt") as file:
            header = file.metadata()
        base = header.get("base_folder", header["base"])
    config = InstructBlipConfig.from_pretrained(base)
    if config.text_config.model_type == "t5":
        config.text_config.dense_act_fn = "gelu"  # the exact GELU, with which the adapter was trained
    model = InstructBlipForConditionalGeneration.from_pretrained(
        base, config=config, dtype=dtype, use_safetensors=True, **options
    )
    return add_adapter(model).eval()


def add_adapter(model: Any, folder: Path = FOLDER) -> Any:
    """Write the trained tensors into a loaded base model, in place, and add the layers of peft, if there are any."""
    with torch.no_grad():
        for name, tensor in load_file(folder / "trained.safetensors").items():
            parameter = model.get_parameter(name)
            parameter.copy_(tensor.view_as(parameter))
    if not (folder / "adapter_config.json").exists():
        return model
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    settings.pop(NOTICE, None)
    config = PeftConfig.from_peft_type(**settings)
    return PeftModel.from_pretrained(model, str(folder), config=config, use_safetensors=True)
