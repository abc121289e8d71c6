"""Measure what one answer costs on this machine: time and peak memory of a loaded model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blipfit.data.batches import PromptBatch
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.runtime import cpu_memory

_WARM_UP_RUNS = 2


def measure(backbone: Backbone, lengths: Lengths, repeats: int = 20) -> dict[str, Any]:
    """Generate an answer to a question of random pixels and tokens `repeats` times, greedily, in its full length.

    Returns the median and 95th percentile of the seconds of the whole answer and of its stages, and the peak memory in
    bytes: on a GPU the memory allocated by torch, on Linux the resident memory of the whole process, else None.
    """
    pixels, batch = _random_question(backbone, lengths)
    for _ in range(_WARM_UP_RUNS):
        _time_stages(backbone, pixels, batch, lengths.answer)
    read_peak = _watch_memory(backbone.device)
    runs = [_time_stages(backbone, pixels, batch, lengths.answer) for _ in range(repeats)]
    return {
        "repeats": repeats,
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "answer_s": _summarize([sum(stages.values()) for stages in runs]),
        "stages_s": {stage: _summarize([stages[stage] for stages in runs]) for stage in runs[0]},
        "peak_bytes": read_peak(),
    }


def _random_question(backbone: Backbone, lengths: Lengths) -> tuple[Tensor, PromptBatch]:
    """Return random pixels and a random prompt of these lengths; their content does not change the cost."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, 3, backbone.image_size, backbone.image_size, generator=generator)
    config = backbone.hf.config

    def random_ids(length: int, vocab_size: int) -> Tensor:
        return torch.randint(vocab_size // 2, (1, length), generator=generator)

    qformer = random_ids(lengths.qformer, config.qformer_config.vocab_size)
    text = random_ids(lengths.text, config.text_config.vocab_size)
    batch = PromptBatch(qformer, torch.ones_like(qformer), text, torch.ones_like(text))
    return pixels.to(backbone.device), batch.to(backbone.device)


@torch.no_grad()
def _time_stages(backbone: Backbone, pixels: Tensor, batch: PromptBatch, tokens: int) -> dict[str, float]:
    """Return the seconds of each stage of one answer of `tokens` tokens."""
    seconds: dict[str, float] = {}

    def time_stage(stage: str, call: Callable[[], Tensor]) -> Tensor:
        start = time.perf_counter()
        result = call()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        seconds[stage] = time.perf_counter() - start
        return result

    features = time_stage("see", lambda: backbone.see(pixels))
    visual = time_stage("query", lambda: backbone.query(features, batch))
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    time_stage("generate", lambda: backbone.generate(visual, batch, **length, do_sample=False, num_beams=1))
    return seconds


def _summarize(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}


def _watch_memory(device: torch.device) -> Callable[[], int | None]:
    """Reset the peak memory and return a function that reads it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    return cpu_memory.peak_bytes if cpu_memory.reset_peak() else lambda: None
