"""A model on data sets and benchmarks, and an adapter beside it on the same samples: one record a set.

Questions with choices are ranked; open ones are answered in words, judged by ROUGE, exact match and, where a CLIP is
given, the CLIP score; MME is answered in words and scored by the official rule; VL-RewardBench by the likelihood of its
two responses, by the model's own answer, and, where asked for, by its judgement in words.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from blipfit import data as datasets
from blipfit import run as folders
from blipfit.adapters import peft_format
from blipfit.data import encoded_split
from blipfit.data import rewardbench as rows
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.prompts import Prompted, clean, prompt
from blipfit.data.question import SPLITS
from blipfit.data.rewardbench import Pair
from blipfit.errors import UserError
from blipfit.evaluation import clip_score, generation, mme, protocol, ranking, rewardbench, text
from blipfit.evaluation.protocol import See
from blipfit.model.backbone import Backbone
from blipfit.model.clip import Clip
from blipfit.recipe import DataConfig, EvaluationConfig
from blipfit.run import Evaluation
from blipfit.runtime import distributed

BASE, TUNED = "base", "tuned"
WORDS_OF_MME = 10
"""The official rule reads the first four characters of an answer."""


@dataclass(frozen=True, slots=True)
class Settings:
    """How sets are asked; everything here stands in the record."""

    batch_size: int = 16
    decoding: str = "greedy"
    """Of open answers."""
    samples: int = 0
    """Judgements in words of every pair of VL-RewardBench, in each order; the first is greedy if it is the only one."""
    clip: Clip | None = None


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """One set as it is asked."""

    name: str
    split: str
    prompt: str
    encoded_split: EncodedSplit
    pairs: tuple[Pair, ...] = ()

    @property
    def title(self) -> str:
        return f"{self.name}-{self.split}"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a model came to: a record a question, the numbers, and values to be compared sample by sample.

    `values` are in percent of each sample, or, for the CLIP score, 0 to 100.
    """

    records: list[dict[str, Any]]
    metrics: dict[str, Any]
    values: dict[str, list[float]]
    judgements: list[dict[str, Any]] = field(default_factory=list)


def read(
    backbone: Backbone,
    name: str,
    folder: Path,
    split: str = "test",
    prompt_name: str | None = None,
    limit: int | None = None,
) -> EvaluationTask:
    """A set ready for the model; VL-RewardBench has the split `all` too."""
    asked = prompt_name or datasets.dataset(name).prompt
    if name == "rewardbench":
        pairs = _pairs(folder, split, limit)
        return EvaluationTask(name, split, asked, _of_pairs(backbone, pairs, asked), tuple(pairs))
    if name == "mme" and limit is not None and limit % 2:
        raise UserError(f"MME has two questions an image; give an even limit, not {limit}")
    return EvaluationTask(
        name,
        split,
        asked,
        encoded_split.load(backbone.text, DataConfig(name=name, prompt=asked, limit=limit), folder, split),
    )


def answer(backbone: Backbone, task: EvaluationTask, see: See, settings: Settings) -> Outcome:
    """Let what is in the backbone (nothing, or a bank of one) take a set."""
    backbone.hf.eval()
    if task.name == "mme":
        return _mme(backbone, task, see, settings)
    if task.name == "rewardbench":
        return _rewardbench(backbone, task, see, settings)
    if all(question.choices for question in task.encoded_split.questions):
        (judged,) = protocol.evaluate_split(
            backbone, task.encoded_split, see, EvaluationConfig(batch_size=settings.batch_size)
        )
        return Outcome(judged.records, judged.metrics, {"accuracy": _percent(judged.records, "correct")})
    return _worded(backbone, task.encoded_split, see, settings)


def side_by_side(
    backbone: Backbone,
    adapter: Path | None,
    tasks: Sequence[EvaluationTask],
    see: See,
    settings: Settings,
    place: Callable[[EvaluationTask], Evaluation],
    facts: Mapping[str, Any],
    expected: str | None = None,
    listen: Callable[[str], None] = lambda sentence: None,
) -> list[dict[str, Any]]:
    """Judge the model, then the adapter in it, and write and return one record a set.

    `expected` is the SHA-256 that the adapter must have. `facts` go into every record.
    """
    found: dict[str, list[Outcome]] = {BASE: [], TUNED: []}
    seconds = [time.perf_counter()]
    for who in (BASE, TUNED) if adapter else (BASE,):
        bank = None
        if who == TUNED:
            assert adapter is not None
            bank, digest = peft_format.install(backbone, adapter)
            facts = {**facts, "adapter_sha256": digest}
        try:
            if bank is not None and expected not in (None, digest):
                raise UserError(f"{adapter} is not the adapter that its result was made with; train it again")
            for task in tasks:
                listen(f"{task.title}, {who}: {len(task.encoded_split)} questions")
                found[who].append(answer(backbone, task, see, settings))
                seconds.append(time.perf_counter())
        finally:
            if bank is not None:
                bank.remove()
    spent = [b - a for a, b in pairwise(seconds)]
    records = []
    for number, task in enumerate(tasks):
        outcomes = {who: outcomes[number] for who, outcomes in found.items() if outcomes}
        record = {
            **_described(backbone, task, settings),
            **facts,
            **{who: outcome.metrics for who, outcome in outcomes.items()},
            "seconds": round(sum(spent[number :: len(tasks)]), 3),
        }
        if TUNED in outcomes:
            record["difference"] = _differences(outcomes[BASE], outcomes[TUNED])
        _write(place(task), task, outcomes, record)
        records.append(record)
    return records


def _described(backbone: Backbone, task: EvaluationTask, settings: Settings) -> dict[str, Any]:
    return {
        "on": task.name,
        "split": task.split,
        "questions": len(task.encoded_split),
        "prompt": task.prompt,
        "prompt_example": task.encoded_split.prompted[0].prompt,
        "model": backbone.name,
        "batch_size": settings.batch_size,
        "clip": None if settings.clip is None else settings.clip.name,
        "device": distributed.device_name(backbone.device),
        "precision": str(backbone.autocast_dtype or "torch.float32").removeprefix("torch."),
        "versions": folders.versions(),
    }


def _write(
    evaluation: Evaluation, task: EvaluationTask, outcomes: Mapping[str, Outcome], record: Mapping[str, Any]
) -> None:
    """The record last: it makes the evaluation whole."""
    lines = [{"who": who, **line} for who, outcome in outcomes.items() for line in outcome.records]
    folders.write_lines(evaluation.predictions_file, lines)
    for who, outcome in outcomes.items():
        if task.name == "mme":
            said = [line["prediction"] for line in outcome.records]
            mme.write_answers(evaluation.answers(who), task.encoded_split.questions, said)
        if outcome.judgements:
            folders.write_lines(evaluation.judgements_file(who), outcome.judgements)
    folders.write_json(evaluation.record_file, record)


def _differences(base: Outcome, tuned: Outcome) -> dict[str, Any]:
    """Tuned minus base, with paired bootstrap intervals; MME's official scores have none."""
    found = {name: text.difference(values, tuned.values[name]) for name, values in base.values.items()}
    if base.metrics.get("judge") == "mme":
        for total in ("perception", "cognition"):
            found[total] = {"difference": round(tuned.metrics[total] - base.metrics[total], 2), "interval": None}
    return found


# -------------------------------------------------------------- words


def _worded(backbone: Backbone, chosen: EncodedSplit, see: See, settings: Settings) -> Outcome:
    part = EvaluationConfig(method="generation", decoding=settings.decoding, batch_size=settings.batch_size)
    (judged,) = protocol.evaluate_split(backbone, chosen, see, part)
    values = {"rougeL": _percent(judged.records, "rougeL"), "exact": _percent(judged.records, "correct")}
    if settings.clip is not None:
        images = [question.image for question in chosen.questions]
        texts = [record["prediction"] for record in judged.records]
        scored = clip_score.score(settings.clip, images, texts, settings.batch_size)
        values["clip_score"] = list(scored.values)
        judged.metrics["clip_score"] = {"clip": settings.clip.name, "cut": scored.cut, **text.mean(scored.values)}
        for record, value in zip(judged.records, scored.values, strict=True):
            record["clip_score"] = round(value, 4)
    return Outcome(judged.records, judged.metrics, values)


def _percent(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    return [100.0 * record[name] for record in records]


# ---------------------------------------------------------------- MME


def _mme(backbone: Backbone, task: EvaluationTask, see: See, settings: Settings) -> Outcome:
    decoding = replace(generation.PRESETS["greedy"], max_tokens=WORDS_OF_MME)
    chosen = task.encoded_split
    (said,) = generation.generate(
        backbone,
        chosen.encoded,
        lambda at: see([chosen.questions[i] for i in at]),
        decoding,
        settings.batch_size,
    )
    answers: dict[str, list[mme.Answer]] = {}
    records = []
    for question, words in zip(chosen.questions, said, strict=True):
        made = mme.Answer(question.tags["file"], question.question, question.answer.lower(), words)
        answers.setdefault(question.tags["subtask"], []).append(made)
        records.append(
            {
                "id": question.id,
                "prediction": words,
                "answer": question.answer,
                "correct": mme.kind(words) == made.truth,
            }
        )
    metrics = {**mme.score(answers), "method": "generation", "decoding": f"greedy, {WORDS_OF_MME} tokens"}
    return Outcome(records, metrics, {"accuracy": _percent(records, "correct")})


# ------------------------------------------------------- VL-RewardBench


def _pairs(folder: Path, split: str, limit: int | None) -> list[Pair]:
    if split not in (*SPLITS, "all"):
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}, all")
    found = []
    for name in SPLITS if split == "all" else (split,):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            found += rows.read(file)
        elif split != "all":
            raise UserError(f"{file} is missing; run `blipfit prepare rewardbench --from DIR --to {folder}`")
    if not found:
        raise UserError(f"{folder} holds no rows; run `blipfit prepare rewardbench --from DIR --to {folder}`")
    return rows.unique(found)[:limit]


def _of_pairs(backbone: Backbone, pairs: Sequence[Pair], name: str) -> EncodedSplit:
    """The queries as questions; both responses are candidates, the preferred one is wanted."""
    questions = [rows.question(pair, f"{pair.id}#{number}") for number, pair in enumerate(pairs, start=1)]
    prompted = [
        Prompted(prompt(name)(question).prompt, pair.responses[pair.best], pair.responses)
        for question, pair in zip(questions, pairs, strict=True)
    ]
    return EncodedSplit(questions, prompted, backbone.text.encode(prompted))


def _rewardbench(backbone: Backbone, task: EvaluationTask, see: See, settings: Settings) -> Outcome:
    chosen, pairs = task.encoded_split, list(task.pairs)
    spoken = _worded(backbone, chosen, see, settings)
    (choices,) = ranking.rank(
        backbone, chosen.encoded, lambda at: see([chosen.questions[i] for i in at]), settings.batch_size
    )
    sums = [(choice.sums[0], choice.sums[1]) for choice in choices]
    means = [(choice.means[0], choice.means[1]) for choice in choices]
    responses = [response for pair in pairs for response in pair.responses]
    metrics: dict[str, Any] = {
        "judge": "rewardbench",
        "likelihood_sum": rewardbench.pairwise(pairs, sums),
        "likelihood_mean": rewardbench.pairwise(pairs, means),
        "cut_responses": backbone.text.cut_answers(responses),
        "answers": spoken.metrics,
    }
    values = {
        "pairwise_sum": [_preferred(pair, both) for pair, both in zip(pairs, sums, strict=True)],
        "pairwise_mean": [_preferred(pair, both) for pair, both in zip(pairs, means, strict=True)],
        **spoken.values,
    }
    for record, pair, both, mean in zip(spoken.records, pairs, sums, means, strict=True):
        record |= {"category": pair.category, "best": pair.best, "sums": both, "means": mean}
    judgements: list[dict[str, Any]] = []
    if settings.samples:
        judged, judgements = _asked_to_judge(backbone, task, see, settings)
        metrics["judgements"] = judged
    return Outcome(spoken.records, metrics, values, judgements)


def _preferred(pair: Pair, both: tuple[float, float]) -> float:
    """100 where the preferred response has the higher score, 50 where both are equal."""
    best, other = both[pair.best], both[1 - pair.best]
    return 100.0 if best > other else 50.0 if best == other else 0.0


def _asked_to_judge(
    backbone: Backbone, task: EvaluationTask, see: See, settings: Settings
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Judgements in words, both orders, `samples` times; and their score by the official rule."""
    made, records = [], []
    drawn = "sampling" if settings.samples > 1 else "greedy"
    for sample in range(settings.samples):
        decoding = replace(generation.PRESETS[drawn], seed=sample)
        for swapped in (False, True):
            asked = [Prompted(clean(rewardbench.judge_prompt(pair, swapped)), "", ()) for pair in task.pairs]
            (said,) = generation.generate(
                backbone,
                backbone.text.encode(asked),
                lambda at: see([task.encoded_split.questions[i] for i in at]),
                decoding,
                settings.batch_size,
            )
            for pair, words in zip(task.pairs, said, strict=True):
                made.append(rewardbench.Judgement(pair.id, pair.key, pair.best, swapped, words))
                records.append(rewardbench.judgement_record(pair, swapped, words))
    return {**rewardbench.score(made), "decoding": drawn}, records
