"""Counts of the needle study and how sure they are: Wilson intervals, and paired differences by bootstrap.

Two selectors see the same trials, so their difference is taken trial by trial, and trials, not cells, are
what is drawn again: the cells of one trial at several k are not independent (Efron and Tibshirani, An
Introduction to the Bootstrap, 1993, chapter 13: percentile intervals).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from phsa_megatron.evaluation.needles import DEPTHS, NUM_DIGITS

CONTROLS = ("mean_pool", "random_tokens", "last_token", "max_norm", "shuffled", "separators")
"""What stands in the place of punctuation; mean_pool: nothing does."""
ENOUGH_TRIALS = 50
"""A cell with fewer is shown with its number of trials, and no conclusion is drawn from it."""
_RESAMPLES = 10_000

Where = tuple[str, str, int]
"""prefill, text and tokens of a prompt."""
Hits = dict[tuple[str, int], dict[int, bool]]
"""By selector and k (0 where nothing is selected): whether a trial is a hit, by its number."""


def digits_of(cells: Iterable[Mapping[str, Any]]) -> dict[Where, dict[tuple[str, int], dict[int, int]]]:
    """Return the right digits of each trial, as `Hits`; a trial that was measured twice counts once."""
    found: dict[Where, dict[tuple[str, int], dict[int, int]]] = {}
    for cell in cells:
        where = cell["prefill"], cell["text"], cell["num_tokens"]
        trials = found.setdefault(where, {}).setdefault((cell["selector"], cell["topk"]), {})
        for offset, digits in enumerate(cell["num_digits"]):
            trials[cell["first_trial"] + offset] = digits
    return found


def hits_of(cells: Iterable[Mapping[str, Any]]) -> dict[Where, Hits]:
    """Return the hits of the measured cells."""
    return {
        where: {cell: {n: x == NUM_DIGITS for n, x in trials.items()} for cell, trials in digits.items()}
        for where, digits in digits_of(cells).items()
    }


def share(trials: Mapping[int, bool]) -> float:
    """Return the share of hits."""
    return sum(trials.values()) / len(trials)


def at_k(hits: Hits, selector: str, topk: int) -> dict[int, bool] | None:
    """Return the trials of a selector at k, those of k = 0 if it selects nothing, or None."""
    return hits.get((selector, topk)) or hits.get((selector, 0))


def wilson(hits: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Return the 95% interval of a share (Wilson, J. Am. Stat. Assoc. 22, 1927, 209-212)."""
    found, extra = hits / trials, z * z / trials
    middle = (found + extra / 2) / (1 + extra)
    half = z / (1 + extra) * math.sqrt(found * (1 - found) / trials + extra / (4 * trials))
    return max(0.0, middle - half), min(1.0, middle + half)


def with_interval(trials: Mapping[int, bool] | None) -> str:
    """Return `hits/trials (low to high)`, or a dash."""
    if not trials:
        return "-"
    low, high = wilson(sum(trials.values()), len(trials))
    return f"{sum(trials.values())}/{len(trials)} ({low:.2f} to {high:.2f})"


def at_depth(trials: Mapping[int, bool], depth: float) -> dict[int, bool]:
    """Return the trials whose needle is at a depth of `needles.DEPTHS`."""
    return {n: hit for n, hit in trials.items() if DEPTHS[n % len(DEPTHS)] == depth}


def trials_of(cells: Iterable[Mapping[int, bool]]) -> str:
    """Return how many trials the cells have: a number, or the fewest and the most."""
    counts = sorted({len(trials) for trials in cells})
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"


def is_complete(hits: Hits, expected: Iterable[tuple[str, int]]) -> bool:
    """Return whether every expected selector and k has enough trials."""
    return all(len(hits.get(cell, ())) >= ENOUGH_TRIALS for cell in expected)


def gaps(places: Mapping[str, Hits], expected: Collection[tuple[str, int]]) -> list[str]:
    """Return what is missing or has fewer trials than the rest, by text or length; empty if nothing is."""
    most = max((len(trials) for hits in places.values() for trials in hits.values()), default=0)
    found = []
    for name, hits in places.items():
        short = [trials for cell in expected if len(trials := hits.get(cell, {})) < most]
        without = sum(not trials for trials in short)
        some = [trials for trials in short if trials]
        if without == len(expected):
            found.append(f"{name}: not measured")
        elif short:
            says = [f"{without} of {len(expected)} cells not measured"] if without else []
            says += [f"{len(some)} cells with {trials_of(some)} of {most} trials"] if some else []
            found.append(f"{name}: {' and '.join(says)}")
    return found


@dataclass(frozen=True)
class Difference:
    """The mean of (one selector - another), over k, trials and places, with its 95% interval."""

    mean: float
    low: float
    high: float
    num_trials: int
    num_places: int

    @property
    def verdict(self) -> str:
        """Return what the interval says."""
        if self.low > 0:
            return "finds more"
        return "finds fewer" if self.high < 0 else "no difference is shown"

    def __str__(self) -> str:
        """Return the mean and its interval."""
        return f"{self.mean:+.3f} ({self.low:+.3f} to {self.high:+.3f})"


def difference(places: Sequence[Hits], one: str, other: str, topks: Sequence[int]) -> Difference | None:
    """Return how much more often `one` hits than `other`; None if no place has enough common trials.

    Args:
        places: hits by text or length. Each is drawn again by itself and weighs the same.
        one: a selector.
        other: another, on the same trials.
        topks: the difference of a trial is its mean over these k, if both have been measured at all of them.
    """
    by_place = []
    for hits in places:
        pairs = [(at_k(hits, one, k), at_k(hits, other, k)) for k in topks]
        measured = [(a, b) for a, b in pairs if a and b]
        if not measured or len(measured) < len(topks):
            continue
        common = set.intersection(*(set(a) & set(b) for a, b in measured))
        if len(common) >= ENOUGH_TRIALS:
            by_place.append(np.array([[float(a[n]) - b[n] for a, b in measured] for n in common]).mean(1))
    if not by_place:
        return None
    rng = np.random.default_rng(0)
    drawn = np.mean(
        [values[rng.integers(len(values), size=(_RESAMPLES, len(values)))].mean(1) for values in by_place],
        axis=0,
    )
    low, high = np.quantile(drawn, [0.025, 0.975])
    mean = float(np.mean([values.mean() for values in by_place]))
    return Difference(mean, float(low), float(high), sum(map(len, by_place)), len(by_place))


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation; equals share the mean of their ranks; nan if all are equal."""
    ranks = []
    for values in (np.asarray(one), np.asarray(other)):
        below = (values[:, None] > values).sum(1)
        ranks.append(below + ((values[:, None] == values).sum(1) - 1) / 2)
    if any(np.ptp(rank) == 0 for rank in ranks):
        return math.nan
    return float(np.corrcoef(*ranks)[0, 1])
