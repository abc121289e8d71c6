"""Trial steps, taken before a sweep is planned: how long a step of a bank takes, and how much memory it needs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from blipfit.adapters.bank import TRAINING_MATRICES
from blipfit.data.encoded_split import EncodedSplit
from blipfit.errors import UserError
from blipfit.evaluation import evaluate_split
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.runtime import cpu_memory, distributed, sharding
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
    """Measure a few steps and an evaluation of a bank of these recipes; None if the memory is not enough.

    The bank is removed afterwards. Several processes measure together: None if the memory of one is not enough, else
    the slowest and largest values. Raises UserError if a sharded model has not enough memory.
    """
    trial_steps = None
    if backbone.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(backbone.device)
    try:
        try:
            trial_steps = _TrialSteps(backbone, recipes, encoded_split, image_features)
            trial_steps.warm_up()
        except torch.OutOfMemoryError:
            if backbone.is_sharded:  # the others wait for this process to run its layers
                raise UserError(
                    f"a bank of {len(recipes)} does not fit the memory of {backbone.device}; use a smaller --bank"
                ) from None
            fits = False
        else:
            fits = True
        if distributed.any_process(not fits) or trial_steps is None:
            return None
        return _slowest(distributed.all_gather([trial_steps.measure()]))
    except torch.OutOfMemoryError:
        if distributed.process_count() > 1:
            raise
        return None
    finally:
        if trial_steps is not None:
            trial_steps.stepper.remove()
        backbone.hf.eval()
        if backbone.device.type == "cuda":
            torch.cuda.empty_cache()


def _slowest(trials: Sequence[Trial]) -> Trial:
    """The trial of all processes together: each value is that of the process with the highest."""
    first = trials[0]
    highest = [max(getattr(trial, name) for trial in trials) for name in ("seconds", "memory", "evaluation_seconds")]
    return Trial(first.experiments, *highest)


class _TrialSteps:
    """The steps of a trial on the first batches of the training questions."""

    def __init__(
        self,
        backbone: Backbone,
        recipes: Sequence[Recipe],
        encoded_split: EncodedSplit,
        image_features: ImageFeatures,
    ) -> None:
        self.encoded_split, self.image_features = encoded_split, image_features
        self.memory_before = cpu_memory.reset_peak()
        self.stepper = Stepper(backbone, recipes, encoded_split.encoded)
        self.activations = _SavedActivations(self.stepper)
        self.batches = batch_order.effective_batches(encoded_split.lengths, self.stepper.training, 0)

    def warm_up(self) -> None:
        """Take the first step, which counts the saved tensors and is slow, and evaluate some questions.

        This process may run out of memory, so the others do not wait for it.
        """
        self.stepper.train_mode()
        # Stands for training's copy of the best values, which counts in the peak memory.
        self._best_copy = self.stepper.bank.values.clone()
        with (
            distributed.without_collectives(),
            torch.autograd.graph.saved_tensors_hooks(self.activations.count, lambda tensor: tensor),
        ):
            self._step(0, self._features(0))
        if distributed.process_count() > 1:
            _evaluation_seconds(self.stepper, self.encoded_split, self.image_features)

    def measure(self) -> Trial:
        """Take the timed steps with all processes, and return their time, the peak memory and the evaluation time."""
        self.stepper.train_mode()
        times = []
        for number in range(1, TIMED_STEPS + 1):
            features = self._features(number)
            _wait(self.stepper.backbone)
            started = time.perf_counter()
            if self.stepper.recipes[0].data.images != "stored":  # the ViT runs in every step
                features = self._features(number)
            self._step(number, features)
            _wait(self.stepper.backbone)
            times.append(time.perf_counter() - started)
        del self._best_copy
        rise = cpu_memory.peak_bytes() - self.memory_before if self.memory_before else 0
        memory = _peak_bytes(self.stepper, self.activations.bytes, rise)
        evaluation_seconds = _evaluation_seconds(self.stepper, self.encoded_split, self.image_features)
        return Trial(self.stepper.bank.K, sorted(times)[len(times) // 2], memory, evaluation_seconds)

    def _batch(self, number: int) -> list[int]:
        return self.batches[number % min(len(self.batches), TIMED_STEPS + 1)]

    def _features(self, number: int) -> list[Tensor]:
        """The image features of this process's rows, one tensor per micro-batch."""
        micros = batch_order.micro_batches(self._batch(number), self.stepper.training)
        questions = [[self.encoded_split.questions[i] for i in distributed.own_share(micro)] for micro in micros]
        return [self.image_features.features(rows) for rows in questions]

    def _step(self, number: int, features: Sequence[Tensor]) -> None:
        self.stepper.step(self._batch(number), features, 0, number)


def _evaluation_seconds(stepper: Stepper, encoded_split: EncodedSplit, image_features: ImageFeatures) -> float:
    """Seconds to evaluate one question, from the batch of the longest ones; each process evaluates such a batch."""
    config = stepper.recipes[0].evaluation
    longest = encoded_split.longest(config.batch_size)  # evaluation sorts by length, so these share a batch
    features = image_features.features(longest.questions)
    started = time.perf_counter()
    with distributed.without_collectives(alone=True):
        evaluate_split.validate(stepper.backbone, longest, lambda questions: features[: len(questions)], config)
    _wait(stepper.backbone)
    return (time.perf_counter() - started) / len(longest) / distributed.process_count()


def _peak_bytes(stepper: Stepper, activations: int, resident_rise: int) -> int:
    if stepper.backbone.device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(stepper.backbone.device))
    weights = sum(sharding.local_tensor(p).nbytes for p in stepper.backbone.hf.parameters())
    return int(weights + max(TRAINING_MATRICES * stepper.bank.values.nbytes + activations, resident_rise))


def _wait(backbone: Backbone) -> None:
    if backbone.device.type == "cuda":
        torch.cuda.synchronize(backbone.device)


class _SavedActivations:
    """Counts the bytes that autograd saves for backward: each storage once, weights not at all."""

    def __init__(self, stepper: Stepper) -> None:
        self.bytes = 0
        weights = [*stepper.backbone.hf.parameters(), stepper.bank.values]
        self._counted = {sharding.local_tensor(tensor).untyped_storage().data_ptr() for tensor in weights}

    def count(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._counted:
            self._counted.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor
