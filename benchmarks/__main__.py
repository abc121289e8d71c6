"""Runs the benchmarks that need neither a GPU nor data, or those that are named: `python -m benchmarks [NAME…]`."""

import sys

import torch

from benchmarks import grid_step, growth, memory

BENCHMARKS = {"grid_step": grid_step.run, "growth": growth.run, "memory": memory.run}


def main() -> None:
    names = sys.argv[1:] or list(BENCHMARKS)
    if unknown := [name for name in names if name not in BENCHMARKS]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; known: {', '.join(BENCHMARKS)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; close other programs for narrow intervals")
    for name in names:
        BENCHMARKS[name]()


if __name__ == "__main__":
    main()
