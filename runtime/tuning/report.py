"""What a tuned schedule is worth, beside plain intervals, CacheQuant's schedule and fewer steps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..forecast import Extrapolate, Forecast
from ..schedule import Schedule, Steps, Uniform
from .artifact import Measured, Tuned
from .images import ImageSet, Studio
from .search import cachequant


@dataclass(frozen=True)
class Costs:
    """What the engine's calls cost.

    Attributes:
        calls: of a generation.
        ratio: a shallow call's time over a full one's.
        full_seconds: of a full call.
    """

    calls: int
    ratio: float
    full_seconds: float

    def of(self, full: int) -> float:
        """Of a generation with so many full calls, in full calls."""
        return full + self.ratio * (self.calls - full)


def measured(
    studio: Studio, costs: Costs, name: str, schedule: Schedule | None, forecast: Forecast | None, on: ImageSet
) -> Measured:
    """A row: the images of a set with this schedule."""
    psnr, worst = studio.psnr(on, schedule, forecast)
    full = sum(studio.run.full)
    return Measured(
        name=name,
        full_calls=full,
        shallow_calls=costs.calls - full,
        speed_up=costs.calls / costs.of(full),
        psnr=psnr,
        worst=worst,
    )


def rows(studio: Studio, costs: Costs, tuned: Tuned, test: ImageSet, fit: ImageSet) -> list[Measured]:
    """The tuned schedule first, then what it is held against, all on the test images."""
    interval = max(2, math.ceil(costs.calls / len(tuned.document.full)))
    plain, warm = f"every {interval}th call full", Uniform(interval, warmup=2)
    others: Sequence[tuple[str, Schedule, Forecast | None]] = (
        ("tuned schedule, features reused", tuned.schedule, None),
        ("CacheQuant's schedule", Steps(cachequant(costs.calls, interval, _Differences(fit))), None),
        (plain, Uniform(interval), None),
        (f"{plain}, 2 to warm up", warm, None),
        (f"{plain}, 2 to warm up, forecast 0.5", warm, Extrapolate(0.5)),
        (f"{plain}, 2 to warm up, forecast 1", warm, Extrapolate(1.0)),
    )
    made = [measured(studio, costs, "tuned", tuned.schedule, tuned.forecast, test)]
    made += [measured(studio, costs, name, schedule, forecast, test) for name, schedule, forecast in others]
    steps = max(1, round(studio.steps / made[0].speed_up))
    psnr, worst = studio.psnr(test, None, steps=steps)
    calls = len(studio.run.full)
    fewer = Measured(
        name=f"uncached, {steps} steps",
        full_calls=calls,
        shallow_calls=0,
        speed_up=costs.calls / calls,
        psnr=psnr,
        worst=worst,
    )
    return [*made, fewer]


@dataclass(frozen=True)
class _Differences:
    """CacheQuant's D: the L1 distances of the features from ``begin`` to ``end`` - 1 to that of ``begin``."""

    fit: ImageSet

    def __call__(self, begin: int, end: int) -> float:
        return sum(float(each.distances[begin, begin:end].sum()) for each in self.fit.moments.values())
