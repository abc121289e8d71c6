"""`python -m benchmarks [NAME…]`: run the benchmarks that suit this machine, or those named."""

import sys

import torch

from benchmarks import grid_step, growth, memory

ALL = {"grid_step": grid_step.run, "growth": growth.run, "memory": memory.run}


def main() -> None:
    names = sys.argv[1:] or list(ALL)
    if unknown := [name for name in names if name not in ALL]:
        sys.exit(f"unknown benchmark {unknown[0]!r}; known: {', '.join(ALL)}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; a quiet machine gives narrow intervals")
    for name in names:
        ALL[name]()


if __name__ == "__main__":
    main()
