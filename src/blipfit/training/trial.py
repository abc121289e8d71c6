"""Short trial steps: how long a step of a bank takes and how much memory it needs, measured before planning."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfit.adapters.bank import MATRICES
from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import protocol
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.runtime import memory
from blipfit.training import plan
from blipfit.training.step import Stepper

TIMED_STEPS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """What a bank of that size costs."""

    experiments: int
    seconds: float
    """Of one optimizer step of the whole bank, the median of a few."""
    memory: int
    """Bytes at the peak. On a GPU the allocator's; elsewhere the weights and the more of two: the bank with what
    backward keeps, or (Linux) how far the process's resident memory rose."""
    evaluation_seconds: float
    """Of judging one question after an epoch for the whole bank."""

    @property
    def seconds_each(self) -> float:
        return self.seconds / self.experiments


def measure(
    backbone: Backbone, recipes: Sequence[Recipe], encoded_split: EncodedSplit, image_features: ImageFeatures
) -> Trial | None:
    """Take a few steps with a bank of these recipes and put everything back; None where memory does not suffice."""
    stepper = None
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backbone.device)
    before = memory.forget_peak()
    try:
        stepper = Stepper(backbone, recipes, encoded_split.encoded)
        return _measured(stepper, encoded_split, image_features, before)
    except torch.OutOfMemoryError:
        return None
    finally:
        if stepper is not None:
            stepper.remove()
        backbone.hf.eval()
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(stepper: Stepper, encoded_split: EncodedSplit, image_features: ImageFeatures, before: int) -> Trial:
    training = stepper.training
    batches = plan.effective_batches(encoded_split.lengths, training, 0)[: TIMED_STEPS + 1]
    stepper.train_mode()
    times = []
    kept = _Kept(stepper)
    best = stepper.bank.values.clone()  # as training has it
    for number in range(TIMED_STEPS + 1):
        batch = batches[number % len(batches)]
        micros = plan.micro_batches(batch, training)
        questions = [[encoded_split.questions[i] for i in micro] for micro in micros]
        features = [image_features.features(some) for some in questions]
        if number == 0:  # warms up; slow from counting what backward keeps
            with torch.autograd.graph.saved_tensors_hooks(kept.count, lambda tensor: tensor):
                stepper.step(batch, features, 0, number)
            continue
        _wait(stepper.backbone)
        started = time.perf_counter()
        if stepper.recipes[0].data.images != "stored":  # then the ViT runs in every step
            features = [image_features.features(some) for some in questions]
        stepper.step(batch, features, 0, number)
        _wait(stepper.backbone)
        times.append(time.perf_counter() - started)
    del best
    taken = _memory(stepper, kept.bytes, memory.peak() - before if before else 0)
    each = _evaluation_seconds(stepper, encoded_split, image_features)
    return Trial(stepper.bank.K, sorted(times)[len(times) // 2], taken, each)


def _evaluation_seconds(stepper: Stepper, encoded_split: EncodedSplit, image_features: ImageFeatures) -> float:
    """Seconds of judging one question, from one batch."""
    part = stepper.recipes[0].evaluation
    some = encoded_split.longest(part.batch_size)  # judging sorts by length, so these will come together
    features = image_features.features(some.questions)
    started = time.perf_counter()
    protocol.validate(stepper.backbone, some, lambda questions: features[: len(questions)], part)
    _wait(stepper.backbone)
    return (time.perf_counter() - started) / len(some)


def _memory(stepper: Stepper, activations: int, risen: int) -> int:
    if stepper.backbone.device.type == "cuda":
        return torch.cuda.max_memory_allocated(stepper.backbone.device)
    weights = sum(p.numel() * p.element_size() for p in stepper.backbone.hf.parameters())
    return weights + max(MATRICES * stepper.bank.values.nbytes + activations, risen)


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


class _Kept:
    """Counts the bytes that autograd keeps for backward: each storage once, weights not at all."""

    def __init__(self, stepper: Stepper) -> None:
        self.bytes = 0
        held = [*stepper.backbone.hf.parameters(), stepper.bank.values]
        self._seen = {tensor.untyped_storage().data_ptr() for tensor in held}

    def count(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
