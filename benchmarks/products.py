"""What oneDNN gains over MKL in a bank's step: `python -m benchmarks.products`."""

from typing import Any
from unittest import mock

import torch

from benchmarks import measure
from blipfit.adapters.layers import BankLoRA
from blipfit.model import onednn

# Experiments, questions × tokens of each, in, out: the miniatures' layers, BERT's width, a language model's.
SHAPES = ((1, 720, 128, 128), (16, 720, 128, 128), (16, 720, 128, 256), (4, 1600, 768, 768), (4, 1600, 2048, 2048))


def run(rounds: int = 15) -> dict[str, Any]:
    """Forward and backward of a frozen layer with LoRA of rank 8 beside it, both ways in turn."""
    if not onednn.pays():
        raise SystemExit("oneDNN has nothing to give on this machine: torch's own products are used")
    found = {}
    for shape in SHAPES:
        step = _step(*shape)

        def ordinary(step: Any = step) -> None:
            with mock.patch.object(onednn, "pays", return_value=False):
                step()

        taken = measure.alternately({"mkl": ordinary, "onednn": step}, rounds)
        name = "{} experiments, {} rows, {} → {}".format(*shape)
        found[name] = {"seconds": taken, "faster": measure.ratio(taken["mkl"], taken["onednn"])}
        print(f"{name:44} {measure.told(found[name]['faster'])}", flush=True)
    measure.keep("products-cpu", found)
    return found


def _step(K: int, rows: int, wide: int, out: int) -> Any:
    base = torch.nn.Linear(wide, out).requires_grad_(False)
    A, B = (torch.nn.Parameter(torch.randn(shape)) for shape in ((K, 8, wide), (K, out, 8)))
    layer = BankLoRA(base, A, B, torch.ones(K), slice(0, K))
    x = torch.randn(K * rows, wide, requires_grad=True)

    def step() -> None:
        layer(x).sum().backward()

    return step


if __name__ == "__main__":
    run()
