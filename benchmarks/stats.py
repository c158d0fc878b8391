"""Percentiles and confidence intervals, each defined once for all benchmarks."""

from __future__ import annotations

import importlib.util
import itertools
import math
import statistics
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict

from ..errors import MissingExtraError

_RESAMPLES = 2000


class Estimate(BaseModel):
    """A figure with its confidence interval; 95 % unless the caller says otherwise."""

    model_config = ConfigDict(extra="forbid")

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return whether the value lies outside of the interval."""
        return not self.low <= value <= self.high


def require(feature: str, *packages: str) -> None:
    """Check, before hours of work, that packages of the extra ``bench`` are installed.

    Raises:
        MissingExtraError: one of them is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(feature, package, "bench")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value that ``percent`` % of the values do not exceed, interpolated linearly between neighbours.

    Raises:
        ValueError: there are no values, or the percentage is outside 0..100.
    """
    if not len(values) or not 0 <= percent <= 100:
        raise ValueError(f"there is no {percent} % percentile of {len(values)} values")
    import numpy as np

    return float(np.percentile(values, percent))


def mean_of(values: Any, *, seed: int = 0) -> Estimate:
    """Return the mean of independent values with its 95 % interval, by a percentile bootstrap.

    Paired values, such as the differences of two settings for the same prompts and seeds, give a paired interval.
    The interval depends on the values and ``seed`` only.
    """
    import numpy as np

    mean = float(np.mean(values))
    if len(values) < 2:
        return Estimate(mean=mean, low=mean, high=mean)
    require("a confidence interval", "scipy")
    from scipy.stats import bootstrap

    interval = bootstrap(
        (values,), np.mean, n_resamples=_RESAMPLES, batch=100, method="percentile", rng=seed, vectorized=True
    ).confidence_interval
    return Estimate(mean=mean, low=min(mean, float(interval.low)), high=max(mean, float(interval.high)))


def ratio_of_means(old: Sequence[float], new: Sequence[float], confidence: float) -> Estimate | None:
    """Return ``new / old`` of the geometric means of positive values, by Welch's t-interval on the logarithms.

    The rounds of two runs are not pairs, and there are few of them. A bootstrap of three values knows only three
    values, and a rank test of three against three can never be sure. Welch's interval holds for as few as two rounds
    a side, is wide where rounds are few, and an outlier widens it more than it moves it. It cannot see what differs
    between runs but not between rounds, such as the room's temperature.

    Returns:
        None where one side has fewer than two values, so that the noise is unknown.
    """
    if len(old) < 2 or len(new) < 2:
        return None
    require("a confidence interval", "scipy")
    from scipy.stats import ttest_ind

    before, after = ([math.log(value) for value in values] for values in (old, new))
    change = low = high = statistics.fmean(after) - statistics.fmean(before)
    if statistics.variance(before) + statistics.variance(after) > 0:
        found = ttest_ind(after, before, equal_var=False).confidence_interval(confidence)
        low, high = float(found.low), float(found.high)
    return Estimate(mean=math.exp(change), low=math.exp(low), high=math.exp(high))


def difference(old: Estimate, new: Estimate) -> Estimate:
    """Return ``new - old`` of two estimates whose intervals have the same confidence.

    Each bound adds in quadrature the distances that could have moved it there (Zou and Donner 2008, method of variance
    estimates recovery), so that asymmetric intervals, such as those of shares, stay asymmetric.
    """
    change = new.mean - old.mean
    below = math.hypot(new.mean - new.low, old.high - old.mean)
    above = math.hypot(new.high - new.mean, old.mean - old.low)
    return Estimate(mean=change, low=change - below, high=change + above)


def by_round(calls: Sequence[float], rounds: int) -> list[float]:
    """Return the median of each round's calls: calls within a round are not independent readings.

    Args:
        calls: consecutive calls, the same number in each round.
        rounds: number of rounds.
    """
    rounds = min(rounds, len(calls))
    bounds = [len(calls) * index // rounds for index in range(rounds + 1)] if rounds else []
    return [statistics.median(calls[start:end]) for start, end in itertools.pairwise(bounds)]
