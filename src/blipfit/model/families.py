"""The family of a model's language model, read without torch and without a network."""

import json
from pathlib import Path

from blipfit import grid
from blipfit.recipe import Family

_BY_TYPE: dict[str, Family] = {"t5": "t5", "llama": "vicuna"}


def read_family(name: str) -> Family | None:
    """Return the family of a published model, a miniature, a folder or a downloaded hub model; None if unknown."""
    if name in grid.BLOCKS:
        return "t5" if len(grid.BLOCKS[name]) == 2 else "vicuna"
    try:
        config = json.loads(_config_file(name).read_text(encoding="utf-8"))
        return _BY_TYPE.get(config["text_config"]["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _config_file(name: str) -> Path:
    """The configuration in a local folder, or else in the cache of downloads. Raises OSError if there is none."""
    file = Path(name).expanduser() / "config.json"
    if file.is_file():
        return file
    from huggingface_hub import try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")  # raises a ValueError for what is no hub name
    if not isinstance(cached, str):
        raise FileNotFoundError(name)
    return Path(cached)
