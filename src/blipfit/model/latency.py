"""What answering costs on this machine: time and peak memory of one question, measured on a loaded model."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from blipfit.data.batches import PromptBatch
from blipfit.model.backbone import Backbone
from blipfit.model.cost import Lengths
from blipfit.runtime import memory

_WARM_UP = 2


def measure(backbone: Backbone, lengths: Lengths, repeats: int = 20) -> dict[str, Any]:
    """Answer one question of random pixels and tokens `repeats` times, greedily, always to the answer's full length.

    Returns seconds (median, p95) of the whole answer and of its stages, and the peak memory in bytes: on a GPU what
    torch had allocated, on Linux the resident memory of the whole process, else None.
    """
    pixels, batch = _question(backbone, lengths)
    for _ in range(_WARM_UP):
        _answer(backbone, pixels, batch, lengths.answer)
    read_peak = _watch_memory(backbone.device)
    timed = [_answer(backbone, pixels, batch, lengths.answer) for _ in range(repeats)]
    return {
        "repeats": repeats,
        "device": str(backbone.device),
        "threads": torch.get_num_threads(),
        "answer_s": _told([sum(stages.values()) for stages in timed]),
        "stages_s": {stage: _told([stages[stage] for stages in timed]) for stage in timed[0]},
        "peak_bytes": read_peak(),
    }


def _question(backbone: Backbone, lengths: Lengths) -> tuple[Tensor, PromptBatch]:
    """One question of the lengths asked for; which pixels and which tokens does not change the work."""
    generator = torch.Generator().manual_seed(0)
    weight = backbone.hf.vision_model.embeddings.patch_embedding.weight
    pixels = torch.randn(1, 3, backbone.image_size, backbone.image_size, generator=generator)
    config = backbone.hf.config

    def ids(tokens: int, vocabulary: int) -> Tensor:
        return torch.randint(vocabulary // 2, (1, tokens), generator=generator)

    qformer, text = (
        ids(lengths.qformer, config.qformer_config.vocab_size),
        ids(lengths.text, config.text_config.vocab_size),
    )
    batch = PromptBatch(qformer, torch.ones_like(qformer), text, torch.ones_like(text))
    return pixels.to(backbone.device, weight.dtype), batch.to(backbone.device)


@torch.no_grad()
def _answer(backbone: Backbone, pixels: Tensor, batch: PromptBatch, tokens: int) -> dict[str, float]:
    """Seconds of each stage of one answer."""
    seconds: dict[str, float] = {}

    def timed(stage: str, call: Callable[[], Tensor]) -> Tensor:
        started = time.perf_counter()
        result = call()
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)
        seconds[stage] = time.perf_counter() - started
        return result

    features = timed("see", lambda: backbone.see(pixels))
    visual = timed("query", lambda: backbone.query(features, batch))
    length = {"min_new_tokens": tokens, "max_new_tokens": tokens}
    timed("generate", lambda: backbone.generate(visual, batch, **length, do_sample=False, num_beams=1))
    return seconds


def _told(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"median": statistics.median(ordered), "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))]}


def _watch_memory(device: torch.device) -> Callable[[], int | None]:
    """Start a peak over; the function returned reads it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return lambda: torch.cuda.max_memory_allocated(device)
    return memory.peak if memory.forget_peak() else lambda: None
