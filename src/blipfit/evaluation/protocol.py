"""How a recipe's experiments are judged: by ranking where questions have choices, by their own words where not.

Both give two things: a short look after every epoch, which decides the best one, and the full judgement of a split.
K experiments of the backbone's bank are judged together.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.question import Question
from blipfit.errors import UserError
from blipfit.evaluation import generation, ranking, text
from blipfit.evaluation.metrics import accuracy, breakdown
from blipfit.model.backbone import Backbone
from blipfit.recipe import EvaluationConfig
from blipfit.runtime import distributed

See = Callable[[Sequence[Question]], torch.Tensor]
"""Questions → their images' features `B × P × D`."""


@dataclass(frozen=True, slots=True)
class ValidationResult:
    """One experiment after an epoch: `measure` as the log names it, `score` with the better the higher."""

    measure: str
    value: float
    score: float

    @property
    def finite(self) -> bool:
        """Whether it is a number; a model with a broken weight gives none."""
        return math.isfinite(self.value)


@dataclass(frozen=True, slots=True)
class SplitEvaluation:
    """One experiment on a split: a record a question, in order, and what they come to."""

    records: list[dict[str, Any]]
    metrics: dict[str, Any]
    finite: bool = True


def validate(backbone: Backbone, chosen: EncodedSplit, see: See, part: EvaluationConfig) -> list[ValidationResult]:
    """What decides the best epoch: accuracy in percent by ranking, or the loss a label token of open answers."""
    backbone.hf.eval()
    if part.method == "generation":
        return [ValidationResult("val_loss", loss, -loss) for loss in losses(backbone, chosen, see, part.batch_size)]
    found = []
    for choices in _ranked(backbone, chosen, see, part):
        right = [r["correct"] for r in ranking.predictions(chosen.questions, chosen.prompted, choices)]
        score = 100 * sum(right) / len(right) if all(c.finite for c in choices) else math.nan
        found.append(ValidationResult("val_accuracy", score, score))
    return found


def evaluate_split(backbone: Backbone, chosen: EncodedSplit, see: See, part: EvaluationConfig) -> list[SplitEvaluation]:
    """The full judgement of a split, one an experiment."""
    backbone.hf.eval()
    if part.method == "generation":
        spoken = zip(
            losses(backbone, chosen, see, part.batch_size), generated_texts(backbone, chosen, see, part), strict=True
        )
        return [_worded(chosen, texts, loss, part) for loss, texts in spoken]
    judged = []
    for choices in _ranked(backbone, chosen, see, part):
        records = ranking.predictions(chosen.questions, chosen.prompted, choices)
        metrics = ranking.summarize(chosen.questions, records)
        judged.append(SplitEvaluation(records, metrics, all(choice.finite for choice in choices)))
    return judged


def refuse(part: EvaluationConfig, name: str, splits: Mapping[str, Sequence[Question]]) -> None:
    """UserError where questions cannot be judged so."""
    if part.method == "ranking":
        for split in ("val", "test"):
            if openly := next((q for q in splits[split] if not q.choices), None):
                raise UserError(
                    f"{name} {split} {openly.id} has no choices, and ranking needs them; add some, or judge open "
                    "answers with --set evaluation.method=generation"
                )
    generation.preset(part.decoding)


@torch.no_grad()
def losses(backbone: Backbone, chosen: EncodedSplit, see: See, batch_size: int) -> list[float]:
    """Mean negative log-likelihood of a label token, one value an experiment; texts are cut as in training."""
    order = sorted(range(len(chosen)), key=lambda i: len(chosen.encoded[i].prompt) + len(chosen.encoded[i].target))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    total = torch.zeros(backbone.experiments, device=backbone.device)
    for rows in distributed.shard(batches):
        batch = backbone.text.targets([chosen.encoded[i] for i in rows]).to(backbone.device)
        features = see([chosen.questions[i] for i in rows])
        total += backbone.losses(backbone.query(features, batch), batch).to(total)
    labels = sum(len(e.target) for e in chosen.encoded)
    return [value / labels for value in distributed.all_reduce_sum(total).tolist()]


def generated_texts(backbone: Backbone, chosen: EncodedSplit, see: See, part: EvaluationConfig) -> list[list[str]]:
    """Texts of the split's questions, one list an experiment."""
    return generation.generate(
        backbone,
        chosen.encoded,
        lambda rows: see([chosen.questions[i] for i in rows]),
        generation.preset(part.decoding),
        part.batch_size,
    )


def _ranked(backbone: Backbone, chosen: EncodedSplit, see: See, part: EvaluationConfig) -> list[list[ranking.Choice]]:
    return ranking.rank(
        backbone,
        chosen.encoded,
        lambda rows: see([chosen.questions[i] for i in rows]),
        part.batch_size,
    )


def _worded(chosen: EncodedSplit, texts: Sequence[str], loss: float, part: EvaluationConfig) -> SplitEvaluation:
    """Texts against the wanted answers: right is equal after normalizing; ROUGE and both matches of every one."""
    wanted = [prompted.target for prompted in chosen.prompted]
    judged = text.judge(texts, wanted)
    correct = [bool(value) for value in judged["samples"]["exact"]]
    records = [
        {
            "id": question.id,
            "prediction": words,
            "answer": answer,
            "correct": right,
            **{name: round(values[i], 6) for name, values in judged["samples"].items() if name in text.ROUGE},
        }
        for i, (question, words, answer, right) in enumerate(zip(chosen.questions, texts, wanted, correct, strict=True))
    ]
    metrics = {
        "method": part.method,
        "decoding": part.decoding,
        "loss": loss,
        **accuracy(correct),
        "stemmer": judged["stemmer"],
        "texts": judged["metrics"],
        # All questions have the same number of choices: none.
        "by": {name: part for name, part in breakdown(chosen.questions, correct).items() if name != "choices"},
    }
    return SplitEvaluation(records, metrics, math.isfinite(loss))
