"""Benchmarks: each prints both sides, measured alternately in one run, and keeps its raw numbers in results/."""

import blipfit  # noqa: F401  before peft, whose bitsandbytes it keeps quiet
