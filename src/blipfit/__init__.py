"""blipfit: fine-tune InstructBLIP with few trained parameters, evaluate, compare and shrink it."""

import logging
from typing import Any

__version__ = "0.1.0"

# peft imports bitsandbytes where it is installed, and that then says on a CPU which faster kernels it did not find.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def load(model: str | None = None, adapter: Any = None, **options: Any) -> Any:
    """Load a model to be used: `.ask`, `.caption`, `.rank`, `.search`; see `blipfit.inference.load`."""
    from blipfit import inference as use

    return use.load(model, adapter, **options)
