"""How far a figure of one run may lie from that of another by chance alone.

The rounds of two runs are not pairs, and there are few of them. A bootstrap of three values knows only three values,
and a rank test of three against three can never be sure; Welch's t-interval on the logarithms holds for as few as two
rounds a side, pays for few rounds with a wide interval, and is widened, not moved far, by an outlier. What differs
between runs but not between rounds (where memory lies, the room's temperature) it
cannot see: the threshold is for that.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_INTERVALS = 100  # of Simpson's rule: quantiles are right to four digits


@dataclass(frozen=True)
class Interval:
    """An estimate and where the truth lies with the confidence that was asked for."""

    estimate: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        return not self.low <= value <= self.high


def ratio(old: Sequence[float], new: Sequence[float], confidence: float) -> Interval | None:
    """``new / old`` of positive values: of their geometric means, by Welch's t-interval on the logarithms.

    Returns None where one side has fewer than two values, since nothing then tells what noise is.
    """
    if len(old) < 2 or len(new) < 2:
        return None
    before, after = [math.log(value) for value in old], [math.log(value) for value in new]
    change = statistics.fmean(after) - statistics.fmean(before)
    parts = [statistics.variance(values) / len(values) for values in (before, after)]
    error = math.sqrt(sum(parts))
    half = 0.0
    if error > 0:
        freedom = sum(parts) ** 2 / sum(
            part**2 / (len(values) - 1) for part, values in zip(parts, (before, after), strict=True)
        )
        half = student(max(freedom, 1.0), confidence) * error  # rounding can leave it just below 1
    return Interval(math.exp(change), math.exp(change - half), math.exp(change + half))


def difference(old: Interval, new: Interval) -> Interval:
    """``new - old`` of two estimates that have an interval each, of the same confidence.

    Each side of the result adds in quadrature the distances that could have moved it there (Zou and Donner 2008, method
    of variance estimates recovery), so that lopsided intervals, as of shares, stay lopsided.
    """
    change = new.estimate - old.estimate
    below = math.hypot(new.estimate - new.low, old.high - old.estimate)
    above = math.hypot(new.high - new.estimate, old.estimate - old.low)
    return Interval(change, change - below, change + above)


def by_round(calls: Sequence[float], rounds: int) -> list[float]:
    """Medians of consecutive calls, one for each round: the calls within a round are no independent readings."""
    rounds = min(rounds, len(calls))
    bounds = [len(calls) * index // rounds for index in range(rounds + 1)] if rounds else []
    return [statistics.median(calls[start:end]) for start, end in itertools.pairwise(bounds)]


def student(freedom: float, confidence: float) -> float:
    """How many standard errors either side hold so much of Student's t distribution, e.g. 12.71 for (1, 0.95).

    With t = sqrt(freedom) tan(angle) the density is cos(angle) ** (freedom - 1), on a bounded range.
    """
    if freedom < 1 or not 0 < confidence < 1:
        raise ValueError(f"no t quantile for {freedom} degrees of freedom and confidence {confidence}")
    scale = 2 * math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(math.pi)
    low, high = 0.0, math.pi / 2
    for _ in range(45):
        middle = (low + high) / 2
        if scale * _area(freedom - 1, middle) < confidence:
            low = middle
        else:
            high = middle
    return math.sqrt(freedom) * math.tan(low)


def _area(power: float, end: float) -> float:
    """Of cos(x) ** power from 0 to ``end``, by Simpson's rule."""
    width = end / _INTERVALS
    heights = [math.pow(math.cos(index * width), power) for index in range(_INTERVALS + 1)]
    return width / 3 * (heights[0] + 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2]) + heights[-1])
