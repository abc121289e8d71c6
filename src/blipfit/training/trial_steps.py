"""Trial steps, taken before a sweep is planned: how long a step of a bank takes, and how much memory it needs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfit.adapters.bank import TRAINING_MATRICES
from blipfit.data.encoded_split import EncodedSplit
from blipfit.evaluation import split_evaluation
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.runtime import cpu_memory
from blipfit.training import batch_order
from blipfit.training.step import Stepper

TIMED_STEPS = 3


@dataclass(frozen=True, slots=True)
class Trial:
    """The measured cost of a bank of that many experiments."""

    experiments: int
    seconds: float
    """Time of one optimizer step of the whole bank, the median of a few."""
    memory: int
    """Peak in bytes. On a GPU the allocator's; on a CPU the weights plus the larger of two: the bank with the
    activations that backward needs, or (Linux) the rise of the process's resident memory."""
    evaluation_seconds: float
    """Time to evaluate one question for the whole bank."""

    @property
    def seconds_each(self) -> float:
        """Time of one step per experiment."""
        return self.seconds / self.experiments


def measure(
    backbone: Backbone, recipes: Sequence[Recipe], encoded_split: EncodedSplit, image_features: ImageFeatures
) -> Trial | None:
    """Take a few steps with a bank of these recipes, and undo them; None if the memory is not enough."""
    stepper = None
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backbone.device)
    before = cpu_memory.reset_peak()
    try:
        stepper = Stepper(backbone, recipes, encoded_split.encoded)
        return _take_steps(stepper, encoded_split, image_features, before)
    except torch.OutOfMemoryError:
        return None
    finally:
        if stepper is not None:
            stepper.remove()
        backbone.hf.eval()
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def _take_steps(stepper: Stepper, encoded_split: EncodedSplit, image_features: ImageFeatures, before: int) -> Trial:
    training = stepper.training
    batches = batch_order.effective_batches(encoded_split.lengths, training, 0)[: TIMED_STEPS + 1]
    stepper.train_mode()
    times = []
    activations = _SavedActivations(stepper)
    best = stepper.bank.values.clone()  # training has this copy too
    for number in range(TIMED_STEPS + 1):
        batch = batches[number % len(batches)]
        micros = batch_order.micro_batches(batch, training)
        questions = [[encoded_split.questions[i] for i in micro] for micro in micros]
        features = [image_features.features(rows) for rows in questions]
        if number == 0:  # the warm-up; counting the saved tensors makes it slow
            with torch.autograd.graph.saved_tensors_hooks(activations.count, lambda tensor: tensor):
                stepper.step(batch, features, 0, number)
            continue
        _wait(stepper.backbone)
        started = time.perf_counter()
        if stepper.recipes[0].data.images != "stored":  # the ViT runs in every step
            features = [image_features.features(rows) for rows in questions]
        stepper.step(batch, features, 0, number)
        _wait(stepper.backbone)
        times.append(time.perf_counter() - started)
    del best
    peak_bytes = _peak_bytes(stepper, activations.bytes, cpu_memory.peak_bytes() - before if before else 0)
    evaluation_seconds = _evaluation_seconds(stepper, encoded_split, image_features)
    return Trial(stepper.bank.K, sorted(times)[len(times) // 2], peak_bytes, evaluation_seconds)


def _evaluation_seconds(stepper: Stepper, encoded_split: EncodedSplit, image_features: ImageFeatures) -> float:
    """Seconds to evaluate one question, from the batch of the longest ones."""
    config = stepper.recipes[0].evaluation
    longest = encoded_split.longest(config.batch_size)  # evaluation sorts by length, so these share a batch
    features = image_features.features(longest.questions)
    started = time.perf_counter()
    split_evaluation.validate(stepper.backbone, longest, lambda questions: features[: len(questions)], config)
    _wait(stepper.backbone)
    return (time.perf_counter() - started) / len(longest)


def _peak_bytes(stepper: Stepper, activations: int, resident_rise: int) -> int:
    if stepper.backbone.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(stepper.backbone.device))
    weights = sum(p.numel() * p.element_size() for p in stepper.backbone.hf.parameters())
    return int(weights + max(TRAINING_MATRICES * stepper.bank.values.nbytes + activations, resident_rise))


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


class _SavedActivations:
    """Counts the bytes that autograd saves for backward: each storage once, weights not at all."""

    def __init__(self, stepper: Stepper) -> None:
        self.bytes = 0
        weights = [*stepper.backbone.hf.parameters(), stepper.bank.values]
        self._counted = {tensor.untyped_storage().data_ptr() for tensor in weights}

    def count(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
