"""`blipfit score`: answers that exist already, scored by a benchmark's official rule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blipfit.errors import UserError
from blipfit.evaluation import mme_scores, rewardbench_scores
from blipfit.report import score_tables


def run(benchmark: str, source: Path, samples: int | None) -> dict[str, Any]:
    """Score a folder of MME answer files, or a file of VL-RewardBench judgments (its first `samples` per pair).

    Raises UserError if the benchmark is unknown or the source cannot be read.
    """
    if benchmark == "mme":
        return mme_scores.score_mme(source)
    if benchmark == "rewardbench":
        return rewardbench_scores.score_rewardbench(source, samples)
    raise UserError(
        f"unknown benchmark {benchmark!r}; known: mme (a folder of answer files), rewardbench (a file of judgments)"
    )


def render(record: Mapping[str, Any]) -> list[Any]:
    """The benchmark's own table."""
    return score_tables.mme(record) if "subtasks" in record else score_tables.rewardbench(record)
