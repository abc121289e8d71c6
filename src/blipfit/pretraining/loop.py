"""The training loop of pre-training: one module, a dictionary of losses per step, and exact resuming.

The batch of a step depends on the step's number alone. The state is therefore the weights, Adam's two moments and the
number of finished steps; all of it is in one safetensors file.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blipfit.runtime import cpu_memory, onednn

Losses = dict[str, Tensor]
Log = Callable[[dict[str, Any]], None]
MOMENTS = ("exp_avg", "exp_avg_sq")
LOG_EVERY = 50


@dataclass(frozen=True)
class StageSchedule:
    """The length and learning rate of a stage: linear warm-up to `lr` over `warmup` steps, then a half cosine to 0."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    """The largest norm of the gradient."""

    def rate(self, step: int) -> float:
        """Return the learning rate of a step; steps are counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def fit(
    module: nn.Module,
    losses_at: Callable[[int], Losses],
    schedule: StageSchedule,
    state_file: Path,
    log: Log,
    *,
    after_step: Callable[[], None] = lambda: None,
    check: Callable[[], dict[str, Any]] = dict,
    check_every: int = 250,
    until: int | None = None,
    lr_factors: Mapping[str, float] | None = None,
) -> int:
    """Train `module` in place and return the number of finished steps.

    `losses_at(step)` returns the losses whose sum is minimized. `state_file` is loaded if it exists and written every
    `check_every` steps; the results of `check()` are then logged. `until` stops before that step and leaves the
    schedule as it is. `lr_factors` maps the beginning of parameter names to a factor on their learning rate.
    Raises FloatingPointError if a loss is not finite.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    groups = _group_parameters(parameters, schedule.weight_decay, lr_factors or {})
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.98), fused=True)
    step = _load_state(state_file, optimizer, parameters) if state_file.exists() else 0
    end, started = min(schedule.steps, schedule.steps if until is None else until), time.monotonic()
    sums: dict[str, list[float]] = {}
    cpu_memory.keep_freed_memory()
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step) * group["lr_factor"]
        losses = _take_step(step, losses_at, optimizer, parameters.values(), schedule.clip)
        after_step()
        step += 1
        for name, value in losses.items():
            sums.setdefault(name, []).append(float(value.detach()))
        if step % LOG_EVERY == 0 or step == end:
            means = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
            sums = {}
            log({"step": step, "seconds": round(time.monotonic() - started, 1), **means})
        if step % check_every == 0 or step == end:
            _write_state(state_file, optimizer, parameters, step)
            if results := check():
                log({"step": step, "seconds": round(time.monotonic() - started, 1), **results})
    return step


def _group_parameters(
    parameters: Mapping[str, nn.Parameter], weight_decay: float, lr_factors: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Group the parameters by the factor on their learning rate, and by whether their weights decay (matrices only)."""
    kinds: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, value in parameters.items():
        factor = next((factor for prefix, factor in lr_factors.items() if name.startswith(prefix)), 1.0)
        kinds.setdefault((factor, value.ndim > 1), []).append(value)
    return [
        {"params": values, "weight_decay": weight_decay if decays else 0.0, "lr_factor": factor}
        for (factor, decays), values in kinds.items()
    ]


def _take_step(
    step: int,
    losses_at: Callable[[int], Losses],
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    clip: float,
) -> Losses:
    with onednn.onednn_products():
        losses = losses_at(step)
    total = sum(losses.values(), torch.zeros(()))
    if not torch.isfinite(total):
        raise FloatingPointError(f"the loss of step {step} is not finite: {losses}")
    optimizer.zero_grad(set_to_none=True)
    with onednn.onednn_products():
        total.backward()
    nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
    return losses


def _write_state(
    state_file: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], step: int
) -> None:
    """Write weights and moments; the file is replaced as a whole."""
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for moment in MOMENTS:
            if value in optimizer.state:  # a parameter that no loss reached has none
                tensors[f"{moment}.{name}"] = optimizer.state[value][moment]
    state_file.parent.mkdir(parents=True, exist_ok=True)
    temporary = state_file.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"step": str(step)})
    os.replace(temporary, state_file)


def _load_state(state_file: Path, optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> int:
    """Load weights and moments that `_write_state` wrote; returns the number of finished steps."""
    with safe_open(state_file, "pt") as file, torch.no_grad():
        step, names = int(file.metadata()["step"]), set(file.keys())
        for name, value in parameters.items():
            value.copy_(file.get_tensor(f"weight.{name}"))
            if f"{MOMENTS[0]}.{name}" in names:
                moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                optimizer.state[value] = {"step": torch.tensor(float(step)), **moments}
    return step


def open_log(path: Path, **fields: Any) -> Log:
    """Return a function that appends records to `path` as lines of JSON, each beginning with `fields`."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def log(record: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**fields, **record}) + "\n")

    return log
