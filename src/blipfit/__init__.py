"""blipfit: fine-tune InstructBLIP with few trained parameters, evaluate, compare and shrink it."""

import logging
from typing import Any

__version__ = "0.2.0"

# peft imports bitsandbytes if it is installed, which then warns on a CPU about missing GPU kernels.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load(model: str | None = None, adapter: Any = None, **options: Any) -> Any:
    """Load a model for use: `.ask`, `.caption`, `.rank`, `.search`; see `blipfit.inference.load`."""
    from blipfit import inference

    return inference.load(model, adapter, **options)
