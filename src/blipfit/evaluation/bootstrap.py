"""Means, differences and ratios of values per sample, with bootstrap confidence intervals.

Intervals are percentile bootstrap intervals over samples; the same values and seed give the same interval. Shapes: `N`
samples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Values = NDArray[np.float64]
RESAMPLES = 10_000
LEVEL = 0.95
"""Confidence level of the intervals."""
_BLOCK = 2_000_000  # maximum number of resampled indices in memory at once


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
