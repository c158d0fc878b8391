"""What a tuned schedule is worth, beside plain intervals, CacheQuant's schedule and fewer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ...errors import UserError
from ..generation.forecast import Extrapolate, Forecast
from ..generation.schedule import Schedule, Steps, Uniform
from .artifact import Tuned
from .cuts import at_cut, cost_of
from .document import Measured
from .images import ImageSet, Studio
from .search import cachequant


@dataclass(frozen=True)
class Costs:
    """What the engine's calls cost.

    Attributes:
        calls: of a generation.
        ratios: a shallow call's time over a full one's, by cut.
        full_seconds: of a full call.
        measured: the engine's own ratios here, where others were given; empty if ratios has them.
    """

    calls: int
    ratios: Mapping[str, float]
    full_seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)

    def of(self, cuts: Sequence[str | None]) -> float:
        """Of a generation with these calls, each at its cut or full, in full calls."""
        return cost_of(cuts, self.ratios)

    def given(self, ratios: Mapping[str, float]) -> Costs:
        """With these ratios, by cut, in the place of those measured.

        Raises:
            UserError: a cut has none, or there is no such cut.
        """
        if missing := [cut for cut in self.ratios if cut not in ratios]:
            raise UserError(f"no ratio was given for {', '.join(missing)}: give one for each cut, or none")
        if unknown := [cut for cut in ratios if cut not in self.ratios]:
            raise UserError(f"a ratio was given for {', '.join(unknown)}, but tuned for is {', '.join(self.ratios)}")
        return replace(self, ratios={cut: ratios[cut] for cut in self.ratios}, measured=self.ratios)


def measured(
    studio: Studio, costs: Costs, name: str, schedule: Schedule | None, forecast: Forecast | None, on: ImageSet
) -> Measured:
    """A row: the images of a set with this schedule."""
    near = studio.psnr(on, schedule, forecast)
    run = studio.run
    return Measured(
        name=name,
        full_calls=run.timeline.count("#"),
        shallow_calls=run.timeline.count("."),
        skipped_calls=run.timeline.count("_"),
        speed_up=costs.calls / costs.of(run.cuts),
        psnr=statistics.fmean(near),
        worst=min(near),
        full=run.full_calls,
    )


def rows(
    studio: Studio,
    costs: Costs,
    tuned: Tuned,
    others: Mapping[str, Tuned],
    test: ImageSet,
    fit: ImageSet,
    *,
    reference: bool = False,
) -> list[Measured]:
    """The tuned schedule first, then what it is held against, all on the test images.

    Args:
        others: what it would be with less to choose from, by name.
        reference: whether the images are another engine's, so that this one's own uncached ones differ.
    """
    interval = _interval(studio.cut, costs, tuned)
    plain, warm = f"every {interval}th call full", Uniform(interval, warmup=2)
    differences = Differences(fit, studio.cuts[studio.cut])
    at = f", {studio.cut}" if len(studio.cuts) > 1 else ""
    known: Sequence[tuple[str, Schedule, Forecast | None]] = (
        (f"CacheQuant's schedule{at}", Steps(cachequant(costs.calls, interval, differences)), None),
        (f"{plain}{at}", Uniform(interval), None),
        (f"{plain}, 2 to warm up{at}", warm, None),
        (f"{plain}, 2 to warm up, forecast 0.5{at}", warm, Extrapolate(0.5)),
        (f"{plain}, 2 to warm up, forecast 1{at}", warm, Extrapolate(1.0)),
    )
    made = [measured(studio, costs, "tuned", tuned.schedule, tuned.forecast, test)]
    made += [measured(studio, costs, name, each.schedule, each.forecast, test) for name, each in others.items()]
    made.append(measured(studio, costs, "tuned schedule, features reused", tuned.schedule, None, test))
    if tuned.correction is not None:
        uncorrected = tuned.without_correction().forecast
        made.append(measured(studio, costs, "tuned, answers not corrected", tuned.schedule, uncorrected, test))
    made += [measured(studio, costs, name, schedule, forecast, test) for name, schedule, forecast in known]
    steps = max(1, round(studio.steps / made[0].speed_up))
    near = studio.psnr(test, None, steps=steps)
    calls = len(studio.run.full)
    fewer = Measured(
        name=f"uncached, {steps} steps",
        full_calls=calls,
        shallow_calls=0,
        speed_up=costs.calls / calls,
        psnr=statistics.fmean(near),
        worst=min(near),
        full=tuple(range(calls)),
    )
    if reference:
        made.append(measured(studio, costs, "uncached", None, None, test))
    return [*made, fewer]


def _interval(cut: str, costs: Costs, tuned: Tuned) -> int:
    """The shortest that is as fast as the tuned schedule; where shallow calls take too long for any, by full calls."""
    budget = costs.of(tuned.document.by_call) + 1e-9
    for interval in range(2, costs.calls):
        if costs.of(at_cut(Uniform(interval).full_calls(costs.calls), costs.calls, cut)) <= budget:
            return interval
    return max(2, math.ceil(costs.calls / len(tuned.document.full)))


@dataclass(frozen=True)
class Differences:
    """CacheQuant's D: the L1 distances of the features from ``begin`` to ``end`` - 1 to that of ``begin``."""

    fit: ImageSet
    features: tuple[str, ...]

    def __call__(self, begin: int, end: int) -> float:
        moments = [self.fit.moments[name] for name in self.features]
        return sum(float(each.distances[begin, begin:end].sum()) for each in moments)
