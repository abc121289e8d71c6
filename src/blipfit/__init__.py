"""blipfit: fine-tune InstructBLIP with few trained parameters, evaluate, compare and shrink it."""

__version__ = "0.1.0"
