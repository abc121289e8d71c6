"""How much of a model's performance others keep: all judged on the same samples, in one run, and compared in pairs.

Every set gives each sample a value between 0 and 1, and knows what chance would give it: questions with choices and
VL-RewardBench's pairs by the likeliest candidate, MME by its official rule, open answers by ROUGE-L (chance 0).
Retention is the candidate's mean over the original's: raw, and corrected for chance, (mean − chance) / (original's
mean − chance). Intervals are bootstraps over samples; a resample takes the same samples of both, so that what makes a
sample easy falls out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipfit.adapters import peft_format
from blipfit.errors import UserError
from blipfit.evaluation import benchmarks, ranking, text
from blipfit.evaluation.benchmarks import EvaluationTask, Settings
from blipfit.evaluation.protocol import See
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.image_features import ImageFeatures
from blipfit.recipe import ModelConfig
from blipfit.run import Run


@dataclass(frozen=True, slots=True)
class Answers:
    """One model's values on one set, 0 to 1, with what chance gives; all in the samples' order."""

    samples: list[str]
    values: list[float]
    chance: list[float]


@contextmanager
def opened(name: str, device: torch.device | str, precision: str = "auto") -> Iterator[Backbone]:
    """A model by its name or folder, or a finished run: its model with the adapter in it."""
    run = Run(Path(name))
    if not run.recipe_file.exists():
        yield loading.load(ModelConfig(name=name), precision, device)
        return
    if run.state() != "finished":
        raise UserError(f"{name} is not finished; run the same `blipfit train` again to continue it")
    recipe = run.recipe()
    training = recipe.training
    backbone = loading.load(recipe.model, precision, device, training.max_text_tokens, training.max_target_tokens)
    bank, digest = peft_format.install(backbone, run.adapter)
    try:
        if digest != run.result()["adapter_sha256"]:
            raise UserError(f"{run.adapter} is not the adapter that {run.result_file} was made with; train it again")
        yield backbone
    finally:
        bank.remove()


def answer(backbone: Backbone, task: EvaluationTask, see: See, settings: Settings) -> Answers:
    """Let a model take a set."""
    samples = [question.id for question in task.encoded_split.questions]
    if task.name == "rewardbench":
        return Answers(samples, _preferred(backbone, task, see, settings.batch_size), [0.5] * len(samples))
    outcome = benchmarks.answer(backbone, task, see, settings)
    if "accuracy" not in outcome.values:
        return Answers(samples, [value / 100 for value in outcome.values["rougeL"]], [0.0] * len(samples))
    candidates = [len(prompted.candidates) or 2 for prompted in task.encoded_split.prompted]  # MME: yes or no
    return Answers(samples, [value / 100 for value in outcome.values["accuracy"]], [1 / count for count in candidates])


def _preferred(backbone: Backbone, task: EvaluationTask, see: See, batch_size: int) -> list[float]:
    """1 where the preferred response of a pair is the likelier one, one half where both are equal."""
    chosen = task.encoded_split
    (choices,) = ranking.rank(
        backbone, chosen.encoded, lambda rows: see([chosen.questions[i] for i in rows]), batch_size
    )
    best = [pair.best for pair in task.pairs]
    return [
        0.5 if choice.sums[0] == choice.sums[1] else float(choice.best == wanted)
        for choice, wanted in zip(choices, best, strict=True)
    ]


def answers(
    names: Sequence[str],
    sets: Sequence[tuple[str, Path]],
    device: torch.device | str,
    split: str = "test",
    limit: int | None = None,
    settings: Settings | None = None,
    listen: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Answers]]:
    """What every model answers, by set; one model is in memory at a time."""
    found: list[dict[str, Answers]] = []
    for name in names:
        with opened(name, device) as backbone:
            see = ImageFeatures.from_backbone(backbone, "off").features
            mine: dict[str, Answers] = {}
            for what, folder in sets:
                task = benchmarks.read(backbone, what, folder, "test" if what == "mme" else split, limit=limit)
                listen(f"{name} on {what}: {len(task.encoded_split)} samples")
                mine[what] = answer(backbone, task, see, settings or Settings())
            found.append(mine)
    assert all(one[what].samples == found[0][what].samples for one in found for what in one), "the same samples"
    return found


def told(answered: Answers, seed: int = 0) -> dict[str, Any]:
    """Mean with interval and what chance gives, in percent."""
    mean = text.mean(answered.values, seed=seed)
    return {
        "accuracy": round(100 * mean["mean"], 4),
        "interval": [round(100 * end, 4) for end in mean["interval"]],
        "chance": round(100 * sum(answered.chance) / len(answered.chance), 4),
        "samples": len(answered.samples),
    }


def retained(base: Answers, candidate: Answers, seed: int = 0) -> dict[str, Any]:
    """Retention raw and corrected for chance, with paired intervals, beside the candidate's own mean.

    Corrected retention is None where the original itself is not surely above chance: there is nothing to keep.
    """
    before, after, lucky = (np.asarray(v, dtype=float) for v in (base.values, candidate.values, base.chance))
    raised = text.mean(before - lucky, seed=seed)
    corrected: dict[str, Any] = {"ratio": None, "interval": None, "samples": len(before)}
    if raised["interval"] is not None and raised["interval"][0] > 0:
        corrected = text.ratio(before - lucky, after - lucky, seed=seed)
    return {
        **told(candidate, seed),
        "difference": text.difference(before, after, seed=seed),
        "raw": text.ratio(before, after, seed=seed),
        "corrected": corrected,
    }


def misses(retention: Mapping[str, Any], at_least: float) -> bool:
    """Whether a set's corrected retention is not surely (95 %) at least so high."""
    interval = retention["corrected"]["interval"]
    return interval is None or interval[0] is None or interval[0] < at_least


def pareto(points: Sequence[tuple[Sequence[float], float | None]]) -> list[bool]:
    """Which of (costs, worth) no other beats: none has costs as low and worth as high, and one of them better."""

    def beats(a: tuple[Sequence[float], float | None], b: tuple[Sequence[float], float | None]) -> bool:
        if a[1] is None or b[1] is None:
            return b[1] is None and a[1] is not None
        no_worse = all(x <= y for x, y in zip(a[0], b[0], strict=True)) and a[1] >= b[1]
        return no_worse and (tuple(a[0]) != tuple(b[0]) or a[1] > b[1])

    return [not any(beats(other, point) for other in points) for point in points]
