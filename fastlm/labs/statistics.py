"""Numbers with their doubt: spread over seeds, bootstrapped intervals, calibration, detection."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (of a sample, n - 1) of the same measurement with several seeds."""

    mean: float
    deviation: float
    count: int

    def __str__(self) -> str:
        digits = 0 if abs(self.mean) >= 100 else 1 if abs(self.mean) >= 10 else 2 if abs(self.mean) >= 1 else 3
        return f"{self.mean:,.{digits}f} ± {self.deviation:,.{digits}f}"


def spread(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("there are no values to take the mean of")
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Spread(float(np.mean(values)), deviation, len(values))


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(
    values: Sequence[float],
    *,
    seed: int,
    statistic: Callable[[NDArray[np.float64]], float] = lambda sample: float(np.mean(sample)),
) -> Interval:
    """The statistic of `values` with the interval between the 2.5 % and 97.5 % points of its bootstrap (Efron 1979)."""
    data = np.asarray(values, dtype=np.float64)
    if not len(data):
        raise ValueError("there are no values to resample")
    generator = np.random.default_rng(seed)
    found = [statistic(data[generator.integers(0, len(data), len(data))]) for _ in range(RESAMPLES)]
    return _interval(statistic(data), found)


def bootstrap_over_seeds(values: NDArray[np.float64], seed: int) -> Interval:
    """The mean of `(seeds, answers)`, its interval by a bootstrap of seeds and, of each, of answers: one model's are
    alike."""
    generator = np.random.default_rng(seed)
    seeds, answers = values.shape
    drawn = generator.integers(0, seeds, (RESAMPLES, seeds))
    found = [np.mean([values[at, generator.integers(0, answers, answers)].mean() for at in row]) for row in drawn]
    return _interval(float(values.mean()), found)


def _interval(value: float, found: Sequence[float]) -> Interval:
    low, high = np.quantile(found, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def auroc(scores: Sequence[float], positive: Sequence[bool]) -> float:
    """Probability that a positive's score is above a negative's, ties counted half; NaN when one kind is missing.

    The Mann-Whitney U statistic over the number of pairs (Hanley and McNeil 1982).
    """
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(positive, dtype=bool)
    above, below = values[marks], values[~marks]
    if not len(above) or not len(below):
        return math.nan
    ordered = np.sort(below)
    lower = np.searchsorted(ordered, above, side="left")
    upper = np.searchsorted(ordered, above, side="right")
    return float((lower + upper).sum() / 2 / len(above) / len(below))


@dataclass(frozen=True)
class CalibrationBin:
    """Answers whose confidence lay in one tenth: their mean confidence, the share that was right, how many."""

    confidence: float
    accuracy: float
    count: int


def calibration(confidences: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[CalibrationBin]:
    """Bins of equal width over [0, 1] that hold an answer, lowest first (Guo et al. 2017, section 2)."""
    values, marks = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    place = np.minimum((values * bins).astype(int), bins - 1)
    return [
        CalibrationBin(float(values[place == i].mean()), float(marks[place == i].mean()), int((place == i).sum()))
        for i in range(bins)
        if (place == i).any()
    ]


def calibration_error(bins: Sequence[CalibrationBin]) -> float:
    """Expected calibration error: |accuracy - confidence| averaged over all answers (Guo et al. 2017, equation 3)."""
    total = sum(b.count for b in bins)
    return sum(b.count * abs(b.accuracy - b.confidence) for b in bins) / total if total else math.nan


def distinct_n(texts: Sequence[Sequence[object]], n: int) -> float:
    """Different n-grams over n-grams, of all texts together (Li et al. 2016); NaN when there is none."""
    grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan
