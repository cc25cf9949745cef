"""95% intervals of scores, over the samples that could have been drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

_Z = 1.959963984540054
"""Of the normal distribution, two-sided 95%."""
_RESAMPLES = 10_000
_ROUNDS = 100
"""Resamples are drawn in so many parts, which bounds the memory for long lists."""


class Interval(NamedTuple):
    """A mean and its 95% interval."""

    mean: float
    low: float
    high: float
    method: str
    """wilson, bootstrap, or none for a single sample that is neither 0 nor 1."""


def of_scores(scores: Sequence[float], seed: int = 0) -> Interval:
    """Return the mean of samples' scores and its interval.

    Hits and misses get Wilson's score interval (E. B. Wilson, 1927), which is right for few samples and for
    means of 0 and 1; other scores the percentile bootstrap (B. Efron, 1979) with 10,000 resamples.

    Args:
        scores: one a sample, at least one.
        seed: of the resamples.
    """
    mean, n = math.fsum(scores) / len(scores), len(scores)
    if set(scores) <= {0.0, 1.0}:
        middle = (mean + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(mean * (1 - mean) / n + _Z**2 / (4 * n**2))
        # At 0 and 1 the bound is exact and only rounding keeps it away.
        low, high = (0.0 if mean == 0 else middle - half), (1.0 if mean == 1 else middle + half)
        return Interval(mean, low, high, "wilson")
    if n == 1:
        return Interval(mean, math.nan, math.nan, "none")
    return of_ratio(scores, [1.0] * n, seed)


def of_ratio(amounts: Sequence[float], weights: Sequence[float], seed: int = 0) -> Interval:
    """Return the sum of amounts over the sum of weights and its bootstrap interval; both are of documents."""
    above, below = np.asarray(amounts, dtype=np.float64), np.asarray(weights, dtype=np.float64)
    mean = float(above.sum() / below.sum())
    if len(above) == 1:
        return Interval(mean, math.nan, math.nan, "none")
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(_ROUNDS):
        drawn = rng.integers(len(above), size=(_RESAMPLES // _ROUNDS, len(above)))
        ratios.append(above[drawn].sum(1) / below[drawn].sum(1))
    low, high = np.quantile(np.concatenate(ratios), (0.025, 0.975))
    return Interval(mean, float(low), float(high), "bootstrap")
