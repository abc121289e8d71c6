"""What oneDNN gains over MKL in a bank's step: `python -m benchmarks.products`."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure
from blipfit.adapters.layers import BankLoRA
from blipfit.runtime import cpu

# Experiments, questions × tokens of each, in, out: the miniatures' layers, BERT's width, a language model's.
SHAPES = ((1, 720, 128, 128), (16, 720, 128, 128), (16, 720, 128, 256), (4, 1600, 768, 768), (4, 1600, 2048, 2048))
# Rows, heads, tokens, width of a head: a bank of 16 of the miniature's Q-Former, BERT's, a language model's.
ATTENTION = ((256, 4, 53, 32), (16, 12, 160, 64), (8, 32, 160, 64))


def run(rounds: int = 15) -> dict[str, Any]:
    """Forward and backward of a frozen layer with LoRA of rank 8 beside it, and of attention, both ways in turn."""
    if not cpu.pays():
        raise SystemExit("oneDNN has nothing to give on this machine: torch's own products are used")
    steps = {"{} experiments, {} rows, {} → {}".format(*shape): _layer(*shape) for shape in SHAPES}
    steps |= {
        "attention of {} rows, {} heads, {} tokens, {} wide".format(*shape): _heads(*shape) for shape in ATTENTION
    }
    found = {}
    for name, step in steps.items():

        def through(step: Callable[[], None] = step) -> None:
            with cpu.products():
                step()

        taken = measure.alternately({"mkl": step, "onednn": through}, rounds)
        found[name] = {"seconds": taken, "faster": measure.ratio(taken["mkl"], taken["onednn"])}
        print(f"{name:54} {measure.told(found[name]['faster'])}", flush=True)
    measure.keep("products-cpu", found)
    return found


def _layer(K: int, rows: int, wide: int, out: int) -> Callable[[], None]:
    base = torch.nn.Linear(wide, out).requires_grad_(False)
    A, B = (torch.nn.Parameter(torch.randn(shape)) for shape in ((K, 8, wide), (K, out, 8)))
    layer = BankLoRA(base, A, B, torch.ones(K), slice(0, K))
    x = torch.randn(K * rows, wide, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    return step


def _heads(rows: int, heads: int, tokens: int, wide: int) -> Callable[[], None]:
    three = [torch.randn(rows, tokens, heads, wide).transpose(1, 2).requires_grad_() for _ in range(3)]
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)

    def step() -> None:
        F.scaled_dot_product_attention(*three, attn_mask=mask).sum().backward()

    return step


if __name__ == "__main__":
    run()
