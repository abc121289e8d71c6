"""Judging texts against references: ROUGE, exact match, and how sure their means are.

All values are one a sample and between 0 and 1, so that they can be kept, averaged and compared. Intervals are
percentile bootstraps over samples: the same values and seed give the same interval. Shapes: N samples.
"""

import string
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
ROUGE = ("rouge1", "rouge2", "rougeL")

RESAMPLES = 10_000
LEVEL = 0.95
# Resampled indices drawn at once: it bounds the memory.
_BLOCK = 2_000_000

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset(("a", "an", "the"))


def rouge(predictions: Sequence[str], references: Sequence[str], stemmer: bool = False) -> dict[str, Values]:
    """ROUGE-1, ROUGE-2 and ROUGE-L, as F1 of each sample, N values each, by Google's `rouge-score`.

    `stemmer` (Porter's, for English) is off, as it is by default there and in `evaluate`; published numbers differ in
    it, so tell it with the result. Texts are lower-cased and cut into `a`–`z` and `0`–`9` there: other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scored = [scorer.score(reference, said) for said, reference in zip(predictions, references, strict=True)]
    return {name: np.array([sample[name].fmeasure for sample in scored], dtype=np.float64) for name in ROUGE}


def exact_match(predictions: Sequence[str], references: Sequence[str], strict: bool = False) -> Values:
    """1 where a prediction equals its reference, else 0; both are normalized first unless `strict`."""
    alike: Callable[[str], str] = str if strict else normalized
    return np.array([alike(p) == alike(r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)


def normalized(text: str) -> str:
    """Lower case, without ASCII punctuation, English articles and superfluous blanks (SQuAD's rule)."""
    return " ".join(word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES)


def judge(
    predictions: Sequence[str], references: Sequence[str], stemmer: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Means with intervals of every measure here, and the values of each sample under `samples`."""
    values = rouge(predictions, references, stemmer)
    values["exact"] = exact_match(predictions, references)
    values["exact_strict"] = exact_match(predictions, references, strict=True)
    return {
        "stemmer": stemmer,
        "metrics": {name: mean(found, seed=seed) for name, found in values.items()},
        "samples": {name: found.tolist() for name, found in values.items()},
    }


def mean(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> dict[str, Any]:
    """Mean of N values with its interval; both None where there are none."""
    (found,) = _columns(values)
    return _told("mean", found.mean, _means((found,), seed, resamples)[0], level, len(found))


def difference(
    base: ArrayLike, tuned: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> dict[str, Any]:
    """Mean of `tuned` minus mean of `base` over the same N samples, with a paired interval.

    Paired: every resample takes the same samples of both, so what makes a sample easy for both falls out.
    """
    before, after = _columns(base, tuned)
    drawn = _means((before, after), seed, resamples)
    return _told("difference", lambda: after.mean() - before.mean(), drawn[1] - drawn[0], level, len(before))


def ratio(
    base: ArrayLike, tuned: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> dict[str, Any]:
    """Mean of `tuned` divided by mean of `base` over the same N samples, with a paired interval (as in `difference`).

    None where the base's mean is 0; an end of the interval is None where it would be infinite.
    """
    before, after = _columns(base, tuned)
    drawn = _means((before, after), seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        quotients = np.where((drawn[0] == 0) & (drawn[1] == 0), np.nan, drawn[1] / drawn[0])
    if not len(before) or before.mean() == 0:
        return {"ratio": None, "interval": None, "samples": len(before)}
    return _told("ratio", lambda: after.mean() / before.mean(), quotients, level, len(before))


def _columns(*values: ArrayLike) -> tuple[Values, ...]:
    columns = tuple(np.asarray(column, dtype=np.float64) for column in values)
    assert all(column.ndim == 1 and len(column) == len(columns[0]) for column in columns), "one value a sample, paired"
    return columns


def _means(columns: tuple[Values, ...], seed: int, resamples: int) -> Values:
    """Means of every column over the same resamples with replacement: columns × resamples."""
    count = len(columns[0])
    means = np.full((len(columns), resamples), np.nan)
    if count:
        generator = np.random.default_rng(seed)
        block = max(1, _BLOCK // count)
        for start in range(0, resamples, block):
            drawn = generator.integers(0, count, size=(min(block, resamples - start), count))
            for row, column in zip(means, columns, strict=True):
                row[start : start + len(drawn)] = column[drawn].mean(axis=1)
    return means


def _told(name: str, value: Callable[[], Any], drawn: Values, level: float, count: int) -> dict[str, Any]:
    if not count:
        return {name: None, "interval": None, "samples": 0}
    # A resample without a value (0 / 0) says nothing either way.
    known = drawn[~np.isnan(drawn)]
    ends = np.quantile(known, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return {
        name: float(value()),
        "interval": [float(end) if np.isfinite(end) else None for end in ends],
        "samples": count,
    }
