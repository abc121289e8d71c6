"""How much of a model's performance others keep: all judged on the same samples, in one run, and compared in pairs.

Every judge gives each sample a 1 (right) or 0 and knows what chance would give it. Retention is the candidate's mean
over the original's: raw, and corrected for chance, (mean − chance) / (original's mean − chance). Intervals are
bootstraps over samples; a resample takes the same samples of both, so that what makes a sample easy falls out.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from blipfit import data as datasets
from blipfit.adapters import peft_format
from blipfit.data import rewardbench
from blipfit.data.prompts import Prompted, clean, prompt
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import ranking, text
from blipfit.evaluation.metrics import accuracy
from blipfit.model import loading
from blipfit.model.backbone import Backbone
from blipfit.model.sight import Sight
from blipfit.recipe import ModelPart
from blipfit.run import Run


@dataclass(frozen=True, slots=True)
class Judge:
    """A name and its samples: images, prompts and what is ranked; the likeliest candidate is the model's answer."""

    name: str
    questions: list[Question]
    prompted: list[Prompted]

    @property
    def chance(self) -> list[float]:
        """What guessing gives each sample."""
        return [1 / len(p.candidates) for p in self.prompted]


def judge(name: str, folder: Path, split: str = "test", limit: int | None = None) -> Judge:
    """The samples of a judge: a data set with choices, `mme` (Yes or No) or `rewardbench` (either response).

    MME's and VL-RewardBench's rules for finished texts are in their own modules; here likelihoods answer, so that
    every model answers every question.
    """
    questions = datasets.load(name, folder, split, limit)
    if name == "rewardbench":
        pairs = rewardbench.read(folder / f"{split}.jsonl")[:limit]
        written = [Prompted(clean(rewardbench.query(p)), p.responses[p.best], p.responses) for p in pairs]
    elif name == "mme":
        written = [Prompted(clean(q.question), q.answer, ("Yes", "No")) for q in questions]
    else:
        written = [prompt(datasets.dataset(name).prompt)(question) for question in questions]
    if openly := next((q.id for q, p in zip(questions, written, strict=True) if len(p.candidates) < 2), None):
        raise UserError(f"{name} {openly} has no choices to tell apart; retention is judged on questions with choices")
    return Judge(name, questions, written)


@contextmanager
def opened(name: str, device: torch.device | str, precision: str = "auto") -> Iterator[Backbone]:
    """A model by its name or folder, or a finished run: its model with the adapter in it."""
    run = Run(Path(name))
    if not run.recipe_file.exists():
        yield loading.load(ModelPart(name=name), precision, device)
        return
    if run.state() != "finished":
        raise UserError(f"{name} is not finished; run the same `blipfit train` again to continue it")
    recipe = run.recipe()
    training = recipe.training
    backbone = loading.load(recipe.model, precision, device, training.max_text_tokens, training.max_target_tokens)
    bank, _ = peft_format.install(backbone, run.adapter)
    try:
        yield backbone
    finally:
        bank.remove()


def correct(backbone: Backbone, judged: Judge, sight: Sight, batch_size: int = 16) -> list[bool]:
    """Whether the likeliest candidate of each sample is the right one."""
    backbone.hf.eval()
    (choices,) = ranking.rank(
        backbone,
        backbone.text.encode(judged.prompted),
        lambda indices: sight.features([judged.questions[i] for i in indices]),
        batch_size,
    )
    return [
        choice.finite and p.candidates[choice.best] == p.target
        for choice, p in zip(choices, judged.prompted, strict=True)
    ]


def answers(
    names: Sequence[str],
    judges: Sequence[Judge],
    device: torch.device | str,
    batch_size: int = 16,
    listen: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, list[bool]]]:
    """What every model gets right, by judge; one model is in memory at a time."""
    found = []
    for name in names:
        listen(name)
        with opened(name, device) as backbone:
            sight = Sight.from_backbone(backbone, "off")
            found.append({judged.name: correct(backbone, judged, sight, batch_size) for judged in judges})
    return found


def retained(base: Sequence[bool], candidate: Sequence[bool], chance: Sequence[float], seed: int = 0) -> dict[str, Any]:
    """Accuracies with intervals, and retention raw and corrected for chance, with paired intervals.

    Corrected retention is None where the original itself is not surely above chance: there is nothing to keep.
    """
    before, after, lucky = (np.asarray(values, dtype=float) for values in (base, candidate, chance))
    raised = text.mean(before - lucky, seed=seed)
    sure = raised["interval"] is not None and raised["interval"][0] > 0
    corrected = text.ratio(before - lucky, after - lucky, seed=seed)
    return {
        **accuracy([bool(value) for value in candidate]),
        "chance": round(100 * float(lucky.mean()), 4),
        "difference": text.difference(before, after, seed=seed),
        "raw": text.ratio(before, after, seed=seed),
        "corrected": corrected if sure else {"ratio": None, "interval": None, "samples": len(before)},
    }


def misses(retention: Mapping[str, Any], at_least: float) -> bool:
    """Whether a judge's corrected retention is not surely (95 %) at least so high."""
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
