"""Benchmarks: each prints both sides, measured alternately in one run, and keeps its raw numbers in results/."""
