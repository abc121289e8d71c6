"""The measurements of `benchmarks.gpu` on one model: steps and ranking, of a bank and of both peers, and a profile."""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import bank, full_size, measure
from benchmarks.peers import OriginalPeer, TrainerPeer
from blipfit.adapters import memory_estimate, parameter_counts
from blipfit.data.encoded_split import EncodedSplit
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import Recipe
from blipfit.training import batch_order
from blipfit.training.step import Stepper

WARM_UP, STEPS = 2, 6
BANK_QUESTIONS, ORIGINAL_QUESTIONS = 64, 16
"""Questions that a bank, and the original protocol, ranks."""
PROFILED_KERNELS, PRINTED_KERNELS = 30, 18


@dataclass(frozen=True)
class Sides:
    """A model with random weights, its questions, and what the utilization is computed from."""

    backbone: Backbone
    questions: EncodedSplit
    image_features: ImageFeatures
    flops: int
    """FLOPs of a step of one experiment."""
    matrix_rate: float
    """FLOPs per second of a large matrix product; nan if it was not measured."""

    def bank_step(self, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """Measure a step of a bank: seconds, utilization, and peak and predicted memory.

        `first_losses` must depend neither on the setting nor on the size of the bank, except that compiling and padding
        change the dropout noise.
        """
        _reset_peak_bytes()
        with self._stepping(recipes) as step:
            losses = step(0)
            for number in range(1, WARM_UP):
                step(number)
            times = [measure.time_once(lambda n=n: step(n)) for n in range(WARM_UP, WARM_UP + STEPS)]  # type: ignore[misc]
        peak, seconds = _peak_bytes(), statistics.median(times)
        per_experiment = seconds / len(recipes)
        return {
            "experiments": len(recipes),
            "step_seconds": seconds,
            "seconds_per_experiment": per_experiment,
            "utilization": self._utilization(per_experiment),
            "peak_bytes": peak,
            "predicted_bytes": _predict_bytes(self.backbone, recipes),
            "ids": [recipe.experiment for recipe in recipes],
            "first_losses": losses.tolist(),
        }

    def trainer_step(self, recipe: Recipe) -> dict[str, Any]:
        """Measure a step of Trainer + peft, between the ends of steps: the Trainer's construction is not counted."""
        _reset_peak_bytes()
        peer = TrainerPeer(self.backbone, recipe, self.questions, bf16=self.backbone.autocast_dtype is not None)
        ends: list[float] = []

        def record_end() -> None:
            measure.synchronize()
            ends.append(time.perf_counter())

        peer.train(WARM_UP + STEPS, record_end)
        times = [after - before for before, after in zip(ends[WARM_UP - 1 :], ends[WARM_UP:], strict=False)]
        seconds = statistics.median(times)
        return {"step_seconds": seconds, "utilization": self._utilization(seconds), "peak_bytes": _peak_bytes()}

    def original_step(self, recipe: Recipe) -> dict[str, Any]:
        """Measure a step of the original protocol."""
        _reset_peak_bytes()
        peer = OriginalPeer(self.backbone, recipe, self.questions)
        with self._autocast():
            peer.train(WARM_UP)
            seconds = measure.time_once(lambda: peer.train(STEPS)) / STEPS
        return {"step_seconds": seconds, "utilization": self._utilization(seconds), "peak_bytes": _peak_bytes()}

    def original_ranking(self, recipe: Recipe) -> dict[str, Any]:
        """Measure ranking one question at a time, as in the original protocol."""
        peer = OriginalPeer(self.backbone, recipe, self.questions)
        rows = range(ORIGINAL_QUESTIONS)
        with self._autocast():
            peer.rank(range(2))
            seconds = measure.time_once(lambda: peer.rank(rows)) / len(rows)
        return {"question_seconds": seconds}

    def bank_ranking(self, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """Measure ranking of questions for all experiments of a bank."""
        warm_up, questions = self._first_questions(16), self._first_questions(BANK_QUESTIONS)
        _reset_peak_bytes()
        bank.rank(self.backbone, recipes, warm_up, self.image_features)
        seconds = measure.time_once(lambda: bank.rank(self.backbone, recipes, questions, self.image_features))
        per_question = seconds / len(questions)
        return {
            "question_seconds": per_question,
            "seconds_per_experiment": per_question / len(recipes),
            "peak_bytes": _peak_bytes(),
        }

    def profile(self, recipes: Sequence[Recipe]) -> dict[str, Any]:
        """Profile one step of a bank: the longest kernels, and how long the device is busy."""
        from torch.profiler import ProfilerActivity, profile

        on_gpu = measure.DEVICE == "cuda"
        with self._stepping(recipes) as step:
            for number in range(WARM_UP):
                step(number)
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
            with profile(activities=activities, acc_events=True) as trace:
                wall_seconds = measure.time_once(lambda: step(WARM_UP))
        events = trace.key_averages()
        kernels = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA] if on_gpu else list(events)
        microseconds = {e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total for e in kernels}
        calls = {e.key: e.count for e in kernels}
        longest = sorted(microseconds, key=lambda key: -microseconds[key])[:PROFILED_KERNELS]
        for key in longest[:PRINTED_KERNELS]:
            print(f"  {microseconds[key] / 1e3:9.2f} ms {calls[key]:6} x {key[:130]}", flush=True)
        return {
            "experiments": len(recipes),
            "wall_seconds": wall_seconds,
            "busy_seconds": sum(microseconds.values()) / 1e6,
            "kernels": sum(calls.values()),
            "longest": [
                {"name": key[:200], "seconds": microseconds[key] / 1e6, "calls": calls[key]} for key in longest
            ],
        }

    @contextmanager
    def _stepping(self, recipes: Sequence[Recipe]) -> Iterator[Callable[[int], Tensor]]:
        """Install a bank; yields a function that reads the features of a step, trains, and returns the losses [K]."""
        stepper = Stepper(self.backbone, recipes, self.questions.encoded)
        stepper.train_mode()
        batches = batch_order.effective_batches(self.questions.lengths, stepper.training, 0)

        def step(number: int) -> Tensor:
            batch = batches[number % len(batches)]
            micros = list(batch_order.micro_batches(batch, stepper.training))
            features = [self.image_features.features([self.questions.questions[i] for i in micro]) for micro in micros]
            losses_K, labels = stepper.step(batch, features, 0, number)
            return losses_K / labels

        try:
            yield step
        finally:
            stepper.remove()
            self.backbone.hf.eval()

    def _utilization(self, step_seconds: float) -> float:
        return self.flops / step_seconds / self.matrix_rate

    def _first_questions(self, number: int) -> EncodedSplit:
        return EncodedSplit(self.questions.questions[:number], [], self.questions.encoded[:number])

    @contextmanager
    def _autocast(self) -> Iterator[None]:
        dtype = self.backbone.autocast_dtype
        with torch.autocast(self.backbone.device.type, dtype, enabled=dtype is not None):
            yield


def _predict_bytes(backbone: Backbone, recipes: Sequence[Recipe]) -> int:
    trained = [parameter_counts.trained_parameters(backbone.hf, backbone.family, recipe.adapter) for recipe in recipes]
    parts = {part for parameters in trained for part in parameters}
    mean = {part: sum(parameters.get(part, 0) for parameters in trained) // len(trained) for part in parts}
    estimate = memory_estimate.estimate_memory(
        backbone.hf,
        mean,
        len(recipes),
        full_size.TEXT,
        recipes[0].training.batch_size,
        recipes[0].performance.checkpointing,
    )
    return int(sum(estimate.values()))


def allocated_bytes() -> int | None:
    """Return the bytes that are allocated on the GPU, or None without one."""
    return torch.cuda.memory_allocated() if measure.DEVICE == "cuda" else None


def _peak_bytes() -> int | None:
    return torch.cuda.max_memory_allocated() if measure.DEVICE == "cuda" else None


def _reset_peak_bytes() -> None:
    if measure.DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
