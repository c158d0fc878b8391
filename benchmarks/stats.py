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
    """A figure with its confidence interval, 95 % by default."""

    model_config = ConfigDict(extra="forbid")

    mean: float
    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Return whether the value lies outside the interval."""
        return not self.low <= value <= self.high


def require(feature: str, *packages: str) -> None:
    """Check that packages of the extra ``bench`` are installed; called before hours of work.

    Raises:
        MissingExtraError: one of them is missing.
    """
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise MissingExtraError(feature, package, "bench")


def percentile(values: Sequence[float], percent: float) -> float:
    """Return a percentile of the values, interpolated linearly between neighbours.

    Raises:
        ValueError: there are no values, or the percentage is outside 0..100.
    """
    if not len(values) or not 0 <= percent <= 100:
        raise ValueError(f"{len(values)} values have no percentile {percent}")
    import numpy as np

    return float(np.percentile(values, percent))


def mean_of(values: Any, *, seed: int = 0) -> Estimate:
    """Return the mean of independent values with its 95 % interval, by a percentile bootstrap.

    Paired values give a paired interval, e.g. the differences between two settings for the same prompts and seeds.
    The interval depends only on the values and ``seed``.
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
    """Return the ratio ``new / old`` of geometric means with Welch's t-interval on the logarithms.

    The rounds of two runs are not paired, and they are few. A bootstrap of three values can only repeat these three
    values, and a rank test of three values against three never reaches a high confidence. Welch's interval holds for
    two or more rounds on each side and is wide where rounds are few. An outlier widens the interval more than it moves
    the ratio. The interval does not cover differences between runs, such as the room's temperature.

    Args:
        old, new: positive values, e.g. seconds of each round.
        confidence: of the interval, from 0 to 1.

    Returns:
        The estimate; None where one side has fewer than two values, so that the noise is unknown.
    """
    if len(old) < 2 or len(new) < 2:
        return None
    require("a confidence interval", "scipy")
    from scipy.stats import ttest_ind

    before, after = ([math.log(value) for value in values] for values in (old, new))
    change = low = high = statistics.fmean(after) - statistics.fmean(before)
    if statistics.variance(before) + statistics.variance(after) > 0:
        interval = ttest_ind(after, before, equal_var=False).confidence_interval(confidence)
        low, high = float(interval.low), float(interval.high)
    return Estimate(mean=math.exp(change), low=math.exp(low), high=math.exp(high))


def difference(old: Estimate, new: Estimate) -> Estimate:
    """Return the difference ``new - old`` of two estimates whose intervals have the same confidence.

    Each bound is the root of a sum of squares: the distances from both means to the bounds that move the difference in
    its direction (Zou and Donner 2008, method of variance estimates recovery). Asymmetric intervals, such as those of
    shares, stay asymmetric.
    """
    change = new.mean - old.mean
    below = math.hypot(new.mean - new.low, old.high - old.mean)
    above = math.hypot(new.high - new.mean, old.mean - old.low)
    return Estimate(mean=change, low=change - below, high=change + above)


def by_round(calls: Sequence[float], rounds: int) -> list[float]:
    """Return the median of each round's calls, because calls within a round are not independent.

    Args:
        calls: consecutive calls, the same number in each round.
        rounds: number of rounds.
    """
    rounds = min(rounds, len(calls))
    bounds = [len(calls) * index // rounds for index in range(rounds + 1)] if rounds else []
    return [statistics.median(calls[start:end]) for start, end in itertools.pairwise(bounds)]
