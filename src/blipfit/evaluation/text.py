"""Compare texts with references (ROUGE, exact match), and bootstrap confidence intervals of means.

Each metric gives one value from 0 to 1 per sample. Intervals are percentile bootstrap intervals over samples; the same
values and seed give the same interval. Shapes: `N` samples.
"""

import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
ROUGE = ("rouge1", "rouge2", "rougeL")

RESAMPLES = 10_000
LEVEL = 0.95
"""Confidence level of the intervals."""
_BLOCK = 2_000_000  # maximum number of resampled indices in memory at once

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = frozenset(("a", "an", "the"))


def rouge(predictions: Sequence[str], references: Sequence[str], stemmer: bool = False) -> dict[str, Values]:
    """Return the F1 of ROUGE-1, ROUGE-2 and ROUGE-L by Google's `rouge-score`, `N` values each.

    `stemmer` turns on Porter's stemmer for English. It is off by default, as in `rouge-score` and Hugging Face's
    `evaluate`; published numbers differ in it, so report it with the result. `rouge-score` lower-cases texts and keeps
    only `a`–`z` and `0`–`9`, so texts in other scripts score 0.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(ROUGE), use_stemmer=stemmer)
    scores = [scorer.score(reference, text) for text, reference in zip(predictions, references, strict=True)]
    return {name: np.array([sample[name].fmeasure for sample in scores], dtype=np.float64) for name in ROUGE}


def count_unread(texts: Sequence[str]) -> dict[str, int]:
    """Count the texts that ROUGE's tokenizer cannot read: it keeps only `a`–`z` and `0`–`9` of a lower-cased text.

    `unread` texts have letters or digits, but none of these, so ROUGE is 0 for them; `partly_read` ones have both
    kinds, and `empty` ones no letter or digit at all. The texts in the three counts are different ones.
    """
    counts = Counter(map(_readability, texts))
    return {"texts": len(texts), **{name: counts[name] for name in ("unread", "partly_read", "empty")}}


def _readability(text: str) -> str:
    letters = [letter for letter in text.lower() if letter.isalnum() or unicodedata.category(letter)[0] == "M"]
    read = sum(letter.isascii() for letter in letters)
    if not letters:
        return "empty"
    return "unread" if read == 0 else "partly_read" if read < len(letters) else "read"


def describe_unread(counts: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return a sentence for each kind of texts that ROUGE cannot read, e.g. `ROUGE cannot read 3 of 4 references …`.

    `counts` has the results of `count_unread` by kind (`references`, `predictions`).
    """
    sentences = []
    for kind, numbers in counts.items():
        if count := numbers["unread"]:
            sentences.append(
                f"ROUGE cannot read {count} of {numbers['texts']} {kind}: its tokenizer keeps only a–z and 0–9, so "
                "their ROUGE is 0 whatever was answered"
            )
        if count := numbers["partly_read"]:
            sentences.append(
                f"ROUGE cannot read letters other than a–z and 0–9 in {count} of {numbers['texts']} {kind}"
            )
    return sentences


def exact_match(predictions: Sequence[str], references: Sequence[str], strict: bool = False) -> Values:
    """Return 1 where a prediction equals its reference and 0 elsewhere; both are normalized first unless `strict`."""
    convert: Callable[[str], str] = str if strict else normalize
    return np.array([convert(p) == convert(r) for p, r in zip(predictions, references, strict=True)], dtype=np.float64)


def normalize(text: str) -> str:
    """Lower-case a text and remove ASCII punctuation, English articles and extra blanks (SQuAD's rule)."""
    return " ".join(word for word in text.lower().translate(_PUNCTUATION).split() if word not in _ARTICLES)


def score_texts(
    predictions: Sequence[str], references: Sequence[str], stemmer: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Compute ROUGE and exact match: means with intervals under `metrics`, values per sample under `samples`.

    `rouge_unread` counts the references and predictions that ROUGE cannot read (`count_unread`).
    """
    values = rouge(predictions, references, stemmer)
    values["exact"] = exact_match(predictions, references)
    values["exact_strict"] = exact_match(predictions, references, strict=True)
    return {
        "stemmer": stemmer,
        "rouge_unread": {"references": count_unread(references), "predictions": count_unread(predictions)},
        "metrics": {name: mean(metric_values, seed=seed) for name, metric_values in values.items()},
        "samples": {name: metric_values.tolist() for name, metric_values in values.items()},
    }


def mean(values: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> dict[str, Any]:
    """Return the mean of `N` values with its interval; both are None without values."""
    (column,) = _to_columns(values)
    return _summarize("mean", column.mean, _resample_means((column,), seed, resamples)[0], level, len(column))


def difference(
    base: ArrayLike, tuned: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> dict[str, Any]:
    """Return the mean of `tuned` minus the mean of `base` over the same `N` samples, with a paired interval.

    Paired: every resample takes the same samples of both, so the differences in difficulty between samples cancel.
    """
    before, after = _to_columns(base, tuned)
    means = _resample_means((before, after), seed, resamples)
    return _summarize("difference", lambda: after.mean() - before.mean(), means[1] - means[0], level, len(before))


def ratio(
    base: ArrayLike, tuned: ArrayLike, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL
) -> dict[str, Any]:
    """Return the mean of `tuned` divided by the mean of `base` over the same `N` samples, with a paired interval.

    The ratio is None if the base's mean is 0; an end of the interval is None if it would be infinite.
    """
    before, after = _to_columns(base, tuned)
    means = _resample_means((before, after), seed, resamples)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where((means[0] == 0) & (means[1] == 0), np.nan, means[1] / means[0])
    if not len(before) or before.mean() == 0:
        return {"ratio": None, "interval": None, "samples": len(before)}
    return _summarize("ratio", lambda: after.mean() / before.mean(), ratios, level, len(before))


def _to_columns(*values: ArrayLike) -> tuple[Values, ...]:
    columns = tuple(np.asarray(column, dtype=np.float64) for column in values)
    paired = all(column.ndim == 1 and len(column) == len(columns[0]) for column in columns)
    assert paired, "values must be paired: one value per sample in each column"
    return columns


def _resample_means(columns: tuple[Values, ...], seed: int, resamples: int) -> Values:
    """Return the means of every column over the same resamples with replacement: columns × resamples."""
    count = len(columns[0])
    means = np.full((len(columns), resamples), np.nan)
    if count:
        generator = np.random.default_rng(seed)
        block = max(1, _BLOCK // count)
        for start in range(0, resamples, block):
            indices = generator.integers(0, count, size=(min(block, resamples - start), count))
            for row, column in zip(means, columns, strict=True):
                row[start : start + len(indices)] = column[indices].mean(axis=1)
    return means


def _summarize(name: str, value: Callable[[], Any], resampled: Values, level: float, count: int) -> dict[str, Any]:
    """Return a statistic with the interval between the quantiles of its resampled values."""
    if not count:
        return {name: None, "interval": None, "samples": 0}
    defined = resampled[~np.isnan(resampled)]  # the ratio of a resample with 0 / 0 is undefined
    ends = np.quantile(defined, [(1 - level) / 2, (1 + level) / 2], method="closest_observation")
    return {
        name: float(value()),
        "interval": [float(end) if np.isfinite(end) else None for end in ends],
        "samples": count,
    }
