"""Measures how much faster oneDNN's matrix products are than MKL's in a bank's step: `python -m benchmarks.products`.

Legend: K experiments.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import measure
from blipfit.adapters.layers import BankLoRA
from blipfit.runtime import onednn

# K, rows (questions × tokens) of each, inputs, outputs: layers of the miniatures, of BERT, of a language model.
SHAPES = ((1, 720, 128, 128), (16, 720, 128, 128), (16, 720, 128, 256), (4, 1600, 768, 768), (4, 1600, 2048, 2048))
# Rows, heads, tokens, head width: a bank of 16 of the miniature's Q-Former, BERT's sizes, a language model's sizes.
ATTENTION = ((256, 4, 53, 32), (16, 12, 160, 64), (8, 32, 160, 64))


def run(rounds: int = 15) -> dict[str, Any]:
    """Time forward and backward of frozen layers with LoRA of rank 8, and of attention; writes and returns times."""
    if not onednn.onednn_is_faster():
        raise SystemExit(
            "oneDNN is not faster on this machine, so blipfit uses torch's own products; nothing to measure"
        )
    steps = {"{} experiments, {} rows, {} → {}".format(*shape): _make_layer_step(*shape) for shape in SHAPES}
    steps |= {
        "attention of {} rows, {} heads, {} tokens, {} wide".format(*shape): _make_attention_step(*shape)
        for shape in ATTENTION
    }
    results: dict[str, Any] = {}
    for name, step in steps.items():

        def step_with_onednn(step: Callable[[], None] = step) -> None:
            with onednn.onednn_products():
                step()

        times = measure.time_alternately({"mkl": step, "onednn": step_with_onednn}, rounds)
        results[name] = {"seconds": times, "faster": measure.compute_speedup(times["mkl"], times["onednn"])}
        print(f"{name:54} {measure.format_speedup(results[name]['faster'])}", flush=True)
    measure.write_results("products-cpu", results)
    return results


def _make_layer_step(K: int, rows: int, inputs: int, outputs: int) -> Callable[[], None]:
    base = torch.nn.Linear(inputs, outputs).requires_grad_(False)
    A, B = (torch.nn.Parameter(torch.randn(shape)) for shape in ((K, 8, inputs), (K, outputs, 8)))
    layer = BankLoRA(base, A, B, torch.ones(K), slice(0, K))
    x = torch.randn(K * rows, inputs, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    return step


def _make_attention_step(rows: int, heads: int, tokens: int, width: int) -> Callable[[], None]:
    query, key, value = (torch.randn(rows, tokens, heads, width).transpose(1, 2).requires_grad_() for _ in range(3))
    mask = torch.ones(rows, 1, tokens, tokens, dtype=torch.bool)

    def step() -> None:
        F.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()

    return step


if __name__ == "__main__":
    run()
