"""The loop of pre-training: one module, one loss a step, resumable to the bit.

A step's batch is a function of the step's number alone, so the state is the weights, Adam's two moments and the
number of steps done; all of it lies in one safetensors file.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from blipfit.runtime import cpu, memory

Losses = dict[str, Tensor]
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """How a stage is trained: warm-up to `lr` over `warmup` steps, then a half cosine down to zero."""

    steps: int
    batch: int
    lr: float
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0

    def rate(self, step: int) -> float:
        """The learning rate of step `step`, counting from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(
    module: nn.Module,
    losses_at: Callable[[int], Losses],
    schedule: Schedule,
    state: Path,
    log: Callable[[dict], None],
    *,
    after_step: Callable[[], None] = lambda: None,
    check: Callable[[], dict] = dict,
    check_every: int = 250,
    until: int | None = None,
    gently: Mapping[str, float] | None = None,
) -> int:
    """Train `module` in place and return the number of steps done.

    `losses_at(step)` gives named losses that are summed. `state` is read where it exists and written with every
    check, whose findings go to the log. `until` stops early without touching the schedule. Parameters whose names begin
    as a key of `gently` learn at that fraction of the rate.
    """
    parameters = {name: value for name, value in module.named_parameters() if value.requires_grad}
    kinds: dict[tuple[float, bool], list[Tensor]] = {}
    for name, value in parameters.items():
        part = next((part for begins, part in (gently or {}).items() if name.startswith(begins)), 1.0)
        kinds.setdefault((part, value.ndim > 1), []).append(value)
    groups = [
        {"params": values, "weight_decay": schedule.weight_decay if decays else 0.0, "part": part}
        for (part, decays), values in kinds.items()
    ]
    optimizer = torch.optim.AdamW(groups, lr=schedule.lr, betas=(0.9, 0.98), fused=True)
    step = _restore(state, module, optimizer, parameters) if state.exists() else 0
    end, began = min(schedule.steps, schedule.steps if until is None else until), time.monotonic()
    sums: dict[str, list[float]] = {}
    memory.keep_freed()
    while step < end:
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step) * group["part"]
        with cpu.products():
            losses = losses_at(step)
        total = sum(losses.values(), torch.zeros(()))
        if not torch.isfinite(total):
            raise FloatingPointError(f"the loss of step {step} is not finite: {losses}")
        optimizer.zero_grad(set_to_none=True)
        with cpu.products():
            total.backward()
        nn.utils.clip_grad_norm_(parameters.values(), schedule.clip)
        optimizer.step()
        after_step()
        step += 1
        for name, value in losses.items():
            sums.setdefault(name, []).append(float(value.detach()))
        if step % 50 == 0 or step == end:
            means = {name: round(sum(values) / len(values), 4) for name, values in sums.items()}
            sums = {}
            log({"step": step, "seconds": round(time.monotonic() - began, 1), **means})
        if step % check_every == 0 or step == end:
            _store(state, module, optimizer, parameters, step)
            if found := check():
                log({"step": step, "seconds": round(time.monotonic() - began, 1), **found})
    return step


def _store(state: Path, module: nn.Module, optimizer, parameters: dict[str, Tensor], step: int) -> None:
    """Write weights and moments, whole or not at all."""
    tensors = {f"weight.{name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        for moment in MOMENTS:
            if value in optimizer.state:  # a parameter that no loss reached has none
                tensors[f"{moment}.{name}"] = optimizer.state[value][moment]
    state.parent.mkdir(parents=True, exist_ok=True)
    part = state.with_suffix(".part")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part, {"step": str(step)})
    os.replace(part, state)


def _restore(state: Path, module: nn.Module, optimizer, parameters: dict[str, Tensor]) -> int:
    """Read what `_store` wrote into module and optimizer; the number of steps done."""
    with safe_open(state, "pt") as file, torch.no_grad():
        step, names = int(file.metadata()["step"]), set(file.keys())
        for name, value in parameters.items():
            value.copy_(file.get_tensor(f"weight.{name}"))
            if f"{MOMENTS[0]}.{name}" in names:
                moments = {moment: file.get_tensor(f"{moment}.{name}") for moment in MOMENTS}
                optimizer.state[value] = {"step": torch.tensor(float(step)), **moments}
    return step


def json_lines(path: Path, **always) -> Callable[[dict], None]:
    """A log that appends each record to `path` as one line of JSON, with `always` in front."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def log(record: dict) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**always, **record}) + "\n")

    return log
