"""What one data set is evaluated with: the loaded questions, the settings, and the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from blipfit import data as blipfit_data
from blipfit.data import encoded_split, rewardbench
from blipfit.data.encoded_split import EncodedSplit
from blipfit.data.prompts import PromptedQuestion, get_prompt
from blipfit.data.question import SPLITS
from blipfit.data.rewardbench import Pair
from blipfit.errors import UserError
from blipfit.evaluation.partial_scores import PartialScores
from blipfit.model.backbone import Backbone
from blipfit.model.clip import Clip
from blipfit.recipe import DataConfig


@dataclass(frozen=True, slots=True)
class Settings:
    """How data sets are evaluated."""

    batch_size: int = 16
    decoding: str = "greedy"
    """Decoding preset for open answers, one of `generation.PRESETS`."""
    samples: int = 0
    """VL-RewardBench: number of generated judgments per pair and order. With 1 decoding is greedy, else sampled."""
    clip: Clip | None = None
    """CLIP model for the CLIP score of open answers; None computes no CLIP score."""
    partial: PartialScores | None = None
    """Scores and answers of an evaluation that was interrupted, and those to save; None saves nothing."""


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """One split of one data set, tokenized and ready for the model."""

    name: str
    split: str
    prompt: str
    """Name of the prompt template."""
    encoded_split: EncodedSplit
    pairs: tuple[Pair, ...] = ()
    """VL-RewardBench only: the pairs of responses, in the order of the questions."""
    limit: int | None = None
    """The number of first questions that was asked for, if the split has so many; None: the whole split."""

    @property
    def title(self) -> str:
        """The name of its evaluation; a part of a split has another, so that it does not replace the whole."""
        return f"{self.name}-{self.split}" + ("" if self.limit is None else f"-first-{self.limit}")


@dataclass(frozen=True, slots=True)
class TaskResult:
    """What the evaluation of one task returns.

    `records` has one record per question, `metrics` the numbers over all questions. `values` maps a metric's name to
    its value for every sample, for paired comparisons: 0 to 100 each. `judgments` has one record per generated
    judgment of VL-RewardBench.
    """

    records: list[dict[str, Any]]
    metrics: dict[str, Any]
    values: dict[str, list[float]]
    judgments: list[dict[str, Any]] = field(default_factory=list)


def load_task(
    backbone: Backbone,
    name: str,
    folder: Path,
    split: str = "test",
    prompt_name: str | None = None,
    limit: int | None = None,
) -> EvaluationTask:
    """Load a split of a data set from its prepared folder and tokenize it for the model.

    `split` is train, val or test; for VL-RewardBench `all` too. `prompt_name` is a prompt template; None uses the
    data set's default. `limit` takes the first questions only. Raises UserError if the split, the files or the limit
    do not fit the data set.
    """
    prompt_name = prompt_name or blipfit_data.get_data_set(name).prompt
    if name == "rewardbench":
        pairs = _load_pairs(folder, split, limit)
        encoded = _encode_pairs(backbone, pairs, prompt_name)
        return EvaluationTask(name, split, prompt_name, encoded, tuple(pairs), limit if len(pairs) == limit else None)
    if name == "mme" and limit is not None and limit % 2:
        raise UserError(f"MME has two questions per image, so the limit must be even; {limit} is odd")
    config = DataConfig(name=name, prompt=prompt_name, limit=limit)
    encoded = encoded_split.load(backbone.text, config, folder, split)
    return EvaluationTask(name, split, prompt_name, encoded, limit=limit if len(encoded) == limit else None)


def percent_values(records: Sequence[dict[str, Any]], key: str) -> list[float]:
    """Return `key` of every record, a number from 0 to 1 or a bool, in percent."""
    return [100.0 * record[key] for record in records]


def _load_pairs(folder: Path, split: str, limit: int | None) -> list[Pair]:
    if split not in (*SPLITS, "all"):
        raise UserError(f"unknown split {split!r}; known: {', '.join(SPLITS)}, all")
    pairs = []
    for name in SPLITS if split == "all" else (split,):
        file = folder / f"{name}.jsonl"
        if file.is_file():
            pairs += rewardbench.read_pairs(file)
        elif split != "all":
            raise UserError(f"{file} is missing; run `blipfit prepare rewardbench --from DIR --to {folder}`")
    if not pairs:
        raise UserError(
            f"{folder} contains no pairs of VL-RewardBench; run `blipfit prepare rewardbench --from DIR --to {folder}`"
        )
    return rewardbench.drop_duplicates(pairs)[:limit]


def _encode_pairs(backbone: Backbone, pairs: Sequence[Pair], prompt_name: str) -> EncodedSplit:
    """Return the queries as questions: both responses are candidates, the preferred one is the target."""
    questions = [rewardbench.to_question(pair, f"{pair.id}#{number}") for number, pair in enumerate(pairs, start=1)]
    prompted = [
        PromptedQuestion(get_prompt(prompt_name)(question).prompt, pair.responses[pair.best], pair.responses)
        for question, pair in zip(questions, pairs, strict=True)
    ]
    return EncodedSplit(questions, prompted, backbone.text.encode(prompted))
