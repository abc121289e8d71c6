"""The space on disk that an evaluation's records will need."""

import json
from collections.abc import Iterable

from blipfit.data.question import Question

_RECORD_BYTES = 200
"""Id, split and names of the fields."""
_CANDIDATE_BYTES = 90
"""Sum, mean and length of a candidate."""
_ANSWER_BYTES = 500
"""A written answer of some 100 tokens."""


def prediction_bytes(questions: Iterable[Question]) -> int:
    """Estimate the bytes of the questions' records in `predictions.jsonl`, for one model."""
    return sum(map(_record_bytes, questions))


def _record_bytes(question: Question) -> int:
    # The prediction by sum, the one by mean and the answer are texts of the length of an answer.
    texts = [json.dumps(text, ensure_ascii=False) for text in (*question.choices, *[question.answer] * 3)]
    numbers = _CANDIDATE_BYTES * len(question.choices) if question.choices else _ANSWER_BYTES
    return _RECORD_BYTES + numbers + sum(len(text.encode(errors="replace")) for text in texts)
