"""Numbers of records, and what their differences allow to be said.

Units of a seed saw the same data from the same weights and answered the same questions, so that differences
are taken inside a seed. With two seeds or more the interval is Student's over the seeds' differences (Student
1908, Biometrika 6): it holds the noise of training. With one seed it is a percentile bootstrap over the
evaluated items (Efron and Tibshirani 1993, chapter 13): it holds the noise of the questions only, and the
sentence says so. Where other variants have several seeds, what a seed does to a difference is estimated from
them, and a difference of one seed has to be larger than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev, variance
from typing import Any

import numpy as np

Record = dict[str, Any]
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""97.5% quantiles of Student's t with 1, 2, ... degrees of freedom."""
_RESAMPLES = 4000
_FLOOR_FRAC = 0.02
"""Below this share of needles, and above what is left of 1, two variants cannot be told apart."""


@dataclass(frozen=True)
class Question:
    """A quantity by which two variants are compared.

    Attributes:
        name: for the table and the sentence.
        lower_is_better: as for losses.
        items: per evaluated item of a record's view: (amount, weight); the quantity is sum / sum.
        unit: after the number.
    """

    name: str
    lower_is_better: bool
    items: Callable[[Record, str], np.ndarray]
    unit: str

    def value(self, record: Record, view: str) -> float:
        """Returns the quantity; nan where nothing was evaluated."""
        items = self.items(record, view)
        return float(items[:, 0].sum() / items[:, 1].sum()) if len(items) else math.nan


def loss_question(name: str, belongs: Callable[[str], bool]) -> Question:
    """Returns the validation loss over the domains that belong to it."""

    def items(record: Record, view: str) -> np.ndarray:
        by_domain = record["views"][view]["nats_and_tokens_by_sequence"]
        rows = [row for domain in sorted(by_domain) if belongs(domain) for row in by_domain[domain]]
        return np.array(rows, dtype=np.float64).reshape(-1, 2)

    return Question(name, True, items, "nats/token")


def needle_question(name: str, **wanted: Any) -> Question:
    """Returns the share of found needles among the cells that have the wanted task, language, ..."""

    def items(record: Record, view: str) -> np.ndarray:
        cells = record["views"][view]["needles"]
        hits = [
            hit
            for cell in cells
            if all(cell[key] == value for key, value in wanted.items())
            for hit in cell["hits"]
        ]
        return np.stack([np.array(hits, dtype=np.float64), np.ones(len(hits))], axis=1)

    return Question(name, False, items, "of the needles")


def answer_question(name: str, **wanted: Any) -> Question:
    """Returns the nats of an answer: it moves before the first needle is found."""

    def items(record: Record, view: str) -> np.ndarray:
        nats = [
            value
            for cell in record["views"][view]["needles"]
            if all(cell[key] == wanted[key] for key in wanted)
            for value in cell["nats"]
        ]
        return np.stack([np.array(nats, dtype=np.float64), np.ones(len(nats))], axis=1)

    return Question(name, True, items, "nats/answer")


def own_view(record: Record) -> str:
    """Returns the view that a model was trained for."""
    settings = record["settings"]
    if settings["attention.kind"] == "dense":
        return "dense"
    own = f"k{settings['attention.train_topk']}"
    return own if own in record["views"] else "k0"


def mean_and_spread(values: Sequence[float], digits: int = 4) -> str:
    """Returns `mean ± standard deviation` (n - 1); one value has no spread."""
    known = [value for value in values if not math.isnan(value)]
    if not known:
        return "-"
    text = f"{mean(known):.{digits}f}"
    return text if len(known) == 1 else f"{text} ± {stdev(known):.{digits}f}"


@dataclass(frozen=True)
class Difference:
    """A quantity of one variant minus that of another.

    Attributes:
        mean: over seeds.
        ours: the first variant's quantity, mean over seeds.
        theirs: the second's.
        low: end of the 95% interval.
        high: the other end.
        num_seeds: that both variants have.
        num_items: evaluated items of each seed.
        lower_is_better: of the quantity.
        seed_limit: for one seed, what 95% of such differences stay below by the seed alone; None if unknown.
    """

    mean: float
    ours: float
    theirs: float
    low: float
    high: float
    num_seeds: int
    num_items: int
    lower_is_better: bool
    seed_limit: float | None = None

    @property
    def verdict(self) -> str:
        """Returns better, worse, that no difference is shown, or why nothing can be said."""
        if not self.lower_is_better and max(self.ours, self.theirs) < _FLOOR_FRAC:
            return "nothing can be said, neither finds them"
        if not self.lower_is_better and min(self.ours, self.theirs) > 1 - _FLOOR_FRAC:
            return "nothing can be said, both find them"
        if self.low <= 0 <= self.high:
            return "no difference is shown"
        if self.seed_limit is not None and abs(self.mean) <= self.seed_limit:
            return "no more than another seed may do"
        side = "better" if (self.mean < 0) == self.lower_is_better else "worse"
        # The noise of training is unknown: another seed could turn it around.
        return side if self.num_seeds > 1 else f"{side} in this one seed"

    @property
    def evidence(self) -> str:
        """Returns what the interval is made of."""
        if self.num_seeds > 1:
            return f"Student's interval over {self.num_seeds} seeds"
        text = f"one seed, bootstrap over {self.num_items} items: training noise is not in it"
        if self.seed_limit is None:
            return text
        return f"{text}; by the variants with more seeds, it alone makes up to {self.seed_limit:.4f}"


def seed_limit(question: Question, by_variant: Mapping[str, Sequence[Record]]) -> float | None:
    """Returns what 95% of differences in one seed stay below if variants are alike.

    The variance of a difference over seeds is pooled over all pairs of variants that share two seeds or more,
    in the views that they were trained for; V of them are taken for V - 1 degrees of freedom.

    Args:
        question: the quantity.
        by_variant: records of each variant, one a seed.

    Returns:
        None where no two variants share two seeds.
    """
    values = {
        name: {r["seed"]: question.value(r, own_view(r)) for r in records}
        for name, records in by_variant.items()
    }
    squares, degrees, names = 0.0, 0, set()
    for first, second in combinations(values, 2):
        seeds = values[first].keys() & values[second].keys()
        if len(seeds) > 1:
            found = [values[first][seed] - values[second][seed] for seed in sorted(seeds)]
            squares += variance(found) * (len(found) - 1)
            degrees += len(found) - 1
            names |= {first, second}
    if not degrees:
        return None
    return _quantile(len(names) - 1) * math.sqrt(squares / degrees)


def _quantile(degrees: int) -> float:
    return _T_95[degrees - 1] if degrees <= len(_T_95) else 1.96


def difference(
    question: Question,
    first: Iterable[tuple[Record, str]],
    second: Iterable[tuple[Record, str]],
    limit: float | None = None,
) -> Difference | None:
    """Returns first minus second, seed by seed; None if they share no seed.

    Args:
        question: the quantity.
        first: (record, view) of one variant, one a seed.
        second: of the other.
        limit: of a difference that is only a seed's (`seed_limit`); used where they share one seed.
    """
    ours = {record["seed"]: (record, view) for record, view in first}
    theirs = {record["seed"]: (record, view) for record, view in second}
    seeds = sorted(set(ours) & set(theirs))
    if not seeds:
        return None
    by_seed = [question.value(*ours[seed]) - question.value(*theirs[seed]) for seed in seeds]
    ours_items, theirs_items = question.items(*ours[seeds[0]]), question.items(*theirs[seeds[0]])
    if len(ours_items) != len(theirs_items) or not len(ours_items):
        return None
    if len(seeds) > 1:
        half = _quantile(len(seeds) - 1) * stdev(by_seed) / math.sqrt(len(seeds))
        low, high = mean(by_seed) - half, mean(by_seed) + half
    else:
        low, high = _bootstrap(ours_items, theirs_items)
    return Difference(
        mean=mean(by_seed),
        ours=mean(question.value(*ours[seed]) for seed in seeds),
        theirs=mean(question.value(*theirs[seed]) for seed in seeds),
        low=low,
        high=high,
        num_seeds=len(seeds),
        num_items=len(ours_items),
        lower_is_better=question.lower_is_better,
        seed_limit=limit if len(seeds) == 1 else None,
    )


def _bootstrap(ours: np.ndarray, theirs: np.ndarray) -> tuple[float, float]:
    """Returns the 95% percentile interval of the difference, resampling pairs of items [n, 2]."""
    generator = np.random.default_rng(0)
    chosen = generator.integers(len(ours), size=(_RESAMPLES, len(ours)))
    totals = [part[chosen].sum(1) for part in (ours, theirs)]
    differences = totals[0][:, 0] / totals[0][:, 1] - totals[1][:, 0] / totals[1][:, 1]
    low, high = np.quantile(differences, [0.025, 0.975])
    return float(low), float(high)
