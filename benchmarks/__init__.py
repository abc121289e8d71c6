"""Benchmarks. Each measures its sides in turn in one run, prints both, and writes the raw numbers to `results/`."""

import blipfit  # noqa: F401  must come before peft: it silences bitsandbytes
