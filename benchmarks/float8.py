"""Measures how much faster FP8 matrix products would make a bank's step on a GPU: `python -m benchmarks.float8`.

Compares a frozen layer's matrix product in bf16 with the same product in FP8 (e4m3, one scale per row and per output).
The input is quantized every time, the weight once; both sides are compiled. Prints the speedup and the relative error.

Shapes: R rows, I inputs, O outputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import measure

ROWS = 17_664  # 8 experiments × 16 questions × 138 tokens
SHAPES = {
    "T5 attention": (2048, 2048),
    "T5 feed-forward in": (2048, 5120),
    "T5 feed-forward out": (5120, 2048),
    "Vicuna attention": (4096, 4096),
    "Vicuna feed-forward in": (4096, 11_008),
    "Vicuna feed-forward out": (11_008, 4096),
}
E4M3_MAX = 448.0


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize `x` [R, I] row by row; returns the rows in FP8 and their scales [R, 1] in fp32."""
    scale = x.abs().amax(dim=1, keepdim=True).float().clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def float8_linear(x: Tensor, weight_OI: Tensor, scale_O1: Tensor) -> Tensor:
    """Return `x Wᵀ` [R, O] in bf16, for `x` [R, I] that is quantized here and a weight that is quantized already."""
    rows, scale_R1 = quantize(x)
    return torch._scaled_mm(rows, weight_OI.t(), scale_a=scale_R1, scale_b=scale_O1.t(), out_dtype=torch.bfloat16)


def run(rounds: int = 7) -> dict[str, Any]:
    """Time every shape; writes and returns the seconds of 10 products, the error and the speedup."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        raise SystemExit("FP8 products need a GPU with compute capability 8.9 or higher, and there is none")
    results: dict[str, Any] = {}
    compiled = torch.compile(float8_linear)
    for name, (inputs, outputs) in SHAPES.items():
        x = torch.randn(ROWS, inputs, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(outputs, inputs, device="cuda", dtype=torch.bfloat16) / inputs**0.5
        quantized, scale = quantize(weight)
        expected = F.linear(x, weight).float()
        error = float((compiled(x, quantized, scale).float() - expected).norm() / expected.norm())
        sides = {
            "bf16": lambda x=x, weight=weight: [F.linear(x, weight) for _ in range(10)],  # type: ignore[misc]
            "fp8": lambda x=x, q=quantized, s=scale: [compiled(x, q, s) for _ in range(10)],  # type: ignore[misc]
        }
        times = measure.time_alternately(sides, rounds)
        results[name] = {
            "seconds_of_10": times,
            "error": error,
            "faster": measure.compute_speedup(times["bf16"], times["fp8"]),
        }
        print(f"{name:26} {measure.format_speedup(results[name]['faster'])}, relative error {error:.4f}", flush=True)
    measure.write_results("float8-gpu", results)
    return results


if __name__ == "__main__":
    run()
