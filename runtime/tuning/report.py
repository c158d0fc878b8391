"""The report of a tuned schedule: its images compared with those of plain intervals, CacheQuant and fewer steps."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..generation.forecast import Extrapolate, Forecast
from ..generation.schedule import Schedule, Steps, Uniform
from .artifact import Tuned
from .document import ReportRow
from .images import ImageSet, TuningPipeline
from .search import CallCosts, cuts_with


def report_row(
    pipeline: TuningPipeline,
    costs: CallCosts,
    name: str,
    schedule: Schedule | None,
    forecast: Forecast | None,
    images: ImageSet,
) -> ReportRow:
    """Generate the images of a set with a schedule, and return the row of the schedule."""
    psnrs = pipeline.psnr(images, schedule, forecast)
    run = pipeline.last_run
    return ReportRow(
        name=name,
        full_calls=run.timeline.count("#"),
        shallow_calls=run.timeline.count("."),
        skipped_calls=run.timeline.count("_"),
        speed_up=costs.calls / costs.cost_of(run.cuts),
        psnr=statistics.fmean(psnrs),
        worst=min(psnrs),
        full=run.full_calls,
    )


def report_rows(
    pipeline: TuningPipeline,
    costs: CallCosts,
    tuned: Tuned,
    restricted: Mapping[str, Tuned],
    test: ImageSet,
    fit: ImageSet,
    *,
    reference: bool = False,
) -> list[ReportRow]:
    """Return the rows of the tuned schedule and of the schedules it is compared with, on the test set.

    The tuned schedule comes first.

    Args:
        pipeline: pipeline that is tuned.
        costs: durations of the engine's calls.
        tuned: the tuned schedule.
        restricted: best schedules of searches with fewer choices, e.g. with one cut only, by the name of their row.
        test: test set.
        fit: fit set, with moments of the features.
        reference: whether the uncached images come from another engine. Uncached images of this engine then have a row.
    """
    interval = _interval(pipeline.cut, costs, tuned)
    plain, warm = f"every {interval}th call full", Uniform(interval, warmup=2)
    distances = SegmentDistances(fit, pipeline.cuts[pipeline.cut])
    at_cut = f", {pipeline.cut}" if len(pipeline.cuts) > 1 else ""
    baselines: Sequence[tuple[str, Schedule, Forecast | None]] = (
        (f"CacheQuant's schedule{at_cut}", Steps(cachequant(costs.calls, interval, distances)), None),
        (f"{plain}{at_cut}", Uniform(interval), None),
        (f"{plain}, 2 to warm up{at_cut}", warm, None),
        (f"{plain}, 2 to warm up, forecast 0.5{at_cut}", warm, Extrapolate(0.5)),
        (f"{plain}, 2 to warm up, forecast 1{at_cut}", warm, Extrapolate(1.0)),
    )

    def row(name: str, schedule: Schedule | None, forecast: Forecast | None) -> ReportRow:
        return report_row(pipeline, costs, name, schedule, forecast, test)

    rows = [row("tuned", tuned.schedule, tuned.forecast)]
    rows += [row(name, other.schedule, other.forecast) for name, other in restricted.items()]
    rows.append(row("tuned schedule, features reused", tuned.schedule, None))
    if tuned.correction is not None:
        rows.append(row("tuned, not corrected", tuned.schedule, tuned.without_correction().forecast))
    rows += [row(*baseline) for baseline in baselines]
    if reference:
        rows.append(row("uncached", None, None))
    steps = max(1, round(pipeline.steps / rows[0].speed_up))
    psnrs = pipeline.psnr(test, None, steps=steps)
    calls = len(pipeline.last_run.full)
    fewer_steps = ReportRow(
        name=f"uncached, {steps} steps",
        full_calls=calls,
        shallow_calls=0,
        speed_up=costs.calls / calls,
        psnr=statistics.fmean(psnrs),
        worst=min(psnrs),
        full=tuple(range(calls)),
    )
    return [*rows, fewer_steps]


def _interval(cut: str, costs: CallCosts, tuned: Tuned) -> int:
    """Return the shortest interval that is as fast as the tuned schedule.

    If shallow calls take too long for any interval to be as fast, return the interval with as many full calls.
    """
    budget = costs.cost_of(tuned.document.by_call) + 1e-9
    for interval in range(2, costs.calls):
        if costs.cost_of(cuts_with(Uniform(interval).full_calls(costs.calls), costs.calls, cut)) <= budget:
            return interval
    return max(2, math.ceil(costs.calls / len(tuned.document.full)))


@dataclass(frozen=True)
class SegmentDistances:
    """CacheQuant's D: sum of L1 distances of the features at the calls before ``end`` from those at ``begin``."""

    fit: ImageSet
    features: tuple[str, ...]

    def __call__(self, begin: int, end: int) -> float:
        moments = [self.fit.moments[name] for name in self.features]
        return sum(float(feature_moments.distances[begin, begin:end].sum()) for feature_moments in moments)


def cachequant(calls: int, interval: int, distances: Callable[[int, int], float]) -> tuple[int, ...]:
    """Return CacheQuant's schedule (CVPR 2025): K = ceil(calls / interval) segments of the smallest total distance.

    A segment is a full call and the shallow calls after it, ceil(interval / 2) to 2 * interval calls together.
    ``D(s, e)`` sums the distances between the features at s and those at the calls up to e - 1. The smallest total
    distance of k segments up to call n is ``M(n, k) = min over j of M(j, k - 1) + D(j, n)``.

    Args:
        calls: number of calls of a generation.
        interval: mean number of calls of a segment.
        distances: ``D``.
    """
    count = math.ceil(calls / interval)
    shortest, longest = math.ceil(interval / 2), 2 * interval
    best: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for _ in range(count):
        row: dict[int, tuple[float, int]] = {}
        for begin, (sum_so_far, _) in best[-1].items():
            for end in range(begin + shortest, min(begin + longest, calls) + 1):
                value = sum_so_far + distances(begin, end)
                if end not in row or value < row[end][0]:
                    row[end] = value, begin
        best.append(row)
    if calls not in best[count]:  # no division into segments of these lengths
        return tuple(range(0, calls, interval))
    chain: list[int] = []
    end = calls
    for number in range(count, 0, -1):
        end = best[number][end][1]
        chain.append(end)
    return tuple(reversed(chain))
