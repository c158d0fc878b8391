"""Search for the full calls and the cuts of a schedule: dynamic programming over prediction errors and engine times.

A schedule is a chain of full calls. The errors of the calls between two full calls (a segment) depend on these two and,
if predictions have a slope, on the full call before them. So the state of the dynamic programming is the last two full
calls.

With several cuts, a cut with a smaller error takes more time. The search runs once for each of several prices of time,
in error per full call's time. At a price each shallow call has the cut with the smallest ``error + price * time``,
independently of the other calls. For every number of full calls the search finds the schedule with the smallest sum.
The Pareto front of the schedules of all prices gives the best schedule for a budget.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

from ...errors import UserError
from ..generation.schedule import SKIP

PRICES = 12
"""Number of prices in addition to zero; more prices give more schedules on the front."""

Array = npt.NDArray[np.float64]

CutsByCall = tuple[str | None, ...]
"""Cut of each call of a generation; None for a full call, ``SKIP`` for a call that runs no engine."""

SegmentErrors = Callable[[int, "int | None", int], Array]
"""``(last, before, until)``: weighted error of each call after the full call ``last`` and before ``until``."""


@dataclass(frozen=True)
class ScoredSchedule:
    """Full calls and cuts of a schedule, with its error and cost.

    Attributes:
        full: indices of the full calls.
        error: sum of the weighted errors of the shallow calls.
        cost: time of a generation, in units of a full call's time.
        cuts: cut of each call, None for a full call; empty where cuts do not matter.
    """

    full: tuple[int, ...]
    error: float
    cost: float
    cuts: CutsByCall = ()


@dataclass(frozen=True)
class CallCosts:
    """Durations of the engine's calls.

    Attributes:
        calls: number of calls of a generation.
        ratios: time of a shallow call divided by a full call's, by cut.
        full_seconds: duration of a full call in seconds.
        measured: measured ratios, if the user gave those in ``ratios``; otherwise empty.
    """

    calls: int
    ratios: Mapping[str, float]
    full_seconds: float
    measured: Mapping[str, float] = field(default_factory=dict)

    def cost_of(self, cuts: Sequence[str | None]) -> float:
        """Return the cost of a generation with these cuts by call, in units of a full call's time."""
        return cost_in_full_calls(cuts, self.ratios)

    def with_ratios(self, ratios: Mapping[str, float]) -> CallCosts:
        """Return the costs with ratios from the user, by cut, in place of the measured ones.

        Raises:
            UserError: a cut has no ratio, or a ratio has no cut.
        """
        if missing := [cut for cut in self.ratios if cut not in ratios]:
            raise UserError(f"no ratio was given for {', '.join(missing)}: give one for each cut, or none")
        if unknown := [cut for cut in ratios if cut not in self.ratios]:
            raise UserError(
                f"a ratio was given for {', '.join(unknown)}, but the tuned cuts are {', '.join(self.ratios)}"
            )
        return replace(self, ratios={cut: ratios[cut] for cut in self.ratios}, measured=self.ratios)


def cuts_with(full: Sequence[int], calls: int, cut: str) -> CutsByCall:
    """Return the cuts by call of a schedule whose shallow calls all have the same cut."""
    return tuple(None if call in full else cut for call in range(calls))


def full_calls(cuts: CutsByCall) -> tuple[int, ...]:
    """Return the indices of the full calls."""
    return tuple(call for call, cut in enumerate(cuts) if cut is None)


def last_two(full: Sequence[int], call: int) -> tuple[int, int | None]:
    """Return the last two full calls before a shallow call, the later one first."""
    earlier = [other for other in full if other < call]
    return earlier[-1], earlier[-2] if len(earlier) > 1 else None


def cost_in_full_calls(cuts: Sequence[str | None], ratios: Mapping[str, float]) -> float:
    """Return the time of a generation with these cuts by call, in units of a full call's time.

    Args:
        cuts: cut of each call.
        ratios: time of a shallow call divided by a full call's, by cut.
    """
    counts = Counter(cuts)
    del counts[SKIP]
    return counts.pop(None, 0) + sum(ratios[cut] * count for cut, count in counts.items() if cut is not None)


def evaluate(full: Sequence[int], calls: int, errors: SegmentErrors, shallow_cost: float) -> ScoredSchedule:
    """Return the schedule with these full calls, with its error and cost.

    Args:
        full: indices of the full calls in order, 0 first.
        calls: number of calls of a generation.
        errors: errors of a segment.
        shallow_cost: time of a shallow call, in units of a full call's time.
    """
    total = 0.0
    for index, last in enumerate(full):
        until = full[index + 1] if index + 1 < len(full) else calls
        total += float(errors(last, full[index - 1] if index else None, until).sum())
    return ScoredSchedule(tuple(full), total, len(full) + shallow_cost * (calls - len(full)))


def best_by_count(calls: int, errors: SegmentErrors, shallow_cost: float, longest: int) -> list[ScoredSchedule]:
    """Return for every number of full calls the schedule with the smallest error, the fewest full calls first.

    Args:
        calls: number of calls of a generation.
        errors: errors of a segment.
        shallow_cost: time of a shallow call, in units of a full call's time.
        longest: largest number of calls from one full call to the next.
    """
    # For the last two full calls: the smallest error of the rest with k more full calls, and the next full call.
    best: dict[tuple[int, int | None], tuple[Array, npt.NDArray[np.intp]]] = {}
    for last in range(calls - 1, -1, -1):
        earlier: list[int | None] = [None] if last == 0 else list(range(max(0, last - longest), last))
        for before in earlier:
            end = min(calls, last + longest)
            cumulative = np.concatenate([[0.0], np.cumsum(errors(last, before, end))])
            options = np.full((end - last, calls), np.inf)
            for until in range(last + 1, end + 1):
                if until == calls:
                    options[until - last - 1, 0] = cumulative[-1]
                else:
                    options[until - last - 1, 1:] = cumulative[until - last - 1] + best[until, last][0][:-1]
            best[last, before] = options.min(0), options.argmin(0) + last + 1
    schedules = []
    for additional in range(calls):
        if not np.isfinite(best[0, None][0][additional]):
            continue
        chain, last, before = [0], 0, None
        for remaining in range(additional, 0, -1):
            last, before = int(best[last, before][1][remaining]), last
            chain.append(last)
        schedules.append(evaluate(chain, calls, errors, shallow_cost))
    return schedules


def best_within(schedules: Sequence[ScoredSchedule], budget: float) -> ScoredSchedule:
    """Return the schedule with the smallest error within a budget; the cheapest schedule if none is within it."""
    affordable = [schedule for schedule in schedules if schedule.cost <= budget + 1e-9]
    if affordable:
        return min(affordable, key=lambda schedule: schedule.error)
    return min(schedules, key=lambda schedule: schedule.cost)


def search_schedules(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, count: int = PRICES
) -> list[ScoredSchedule]:
    """Return the schedules to choose from, the cheapest first; the last one has only full calls.

    With one cut there is one schedule for every number of full calls. With several cuts the schedules are the Pareto
    front of the best schedules at all prices and the best schedules with a single cut.

    Args:
        calls: number of calls of a generation.
        errors: errors of a segment, by cut.
        ratios: time of a shallow call divided by a full call's, by cut.
        longest: largest number of calls from one full call to the next.
        count: number of prices.
    """
    single_cut = [
        replace(schedule, cuts=cuts_with(schedule.full, calls, cut))
        for cut, segment_errors in errors.items()
        for schedule in best_by_count(calls, segment_errors, ratios[cut], longest)
    ]
    if len(errors) == 1:
        return single_cut
    priced = [
        schedule
        for price in _prices(calls, errors, ratios, longest, count)
        for schedule in best_at_price(calls, errors, ratios, longest, price)
    ]
    return pareto_front([*single_cut, *priced])


def best_at_price(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, price: float
) -> list[ScoredSchedule]:
    """Return for every number of full calls the schedule with the smallest ``error + price * cost``.

    The other arguments are those of ``search_schedules``.
    """
    names = _cheapest_first(errors, ratios)
    extra = price * np.array([[ratios[name] - ratios[names[0]]] for name in names])

    def by_cut(last: int, before: int | None, until: int) -> Array:
        return np.stack([errors[name](last, before, until) for name in names])  # [cuts, calls]

    def priced(last: int, before: int | None, until: int) -> Array:
        return np.asarray((by_cut(last, before, until) + extra).min(0))

    schedules = []
    for schedule in best_by_count(calls, priced, ratios[names[0]], longest):
        cuts: list[str | None] = [None] * calls
        error, full = 0.0, schedule.full
        for before, last, until in zip((None, *full), full, (*full[1:], calls), strict=False):
            segment_errors = by_cut(last, before, until)
            chosen = (segment_errors + extra).argmin(0)
            error += float(segment_errors[chosen, np.arange(len(chosen))].sum())
            cuts[last + 1 : until] = [names[index] for index in chosen]
        schedules.append(ScoredSchedule(full, error, cost_in_full_calls(cuts, ratios), tuple(cuts)))
    return schedules


def pareto_front(schedules: Iterable[ScoredSchedule]) -> list[ScoredSchedule]:
    """Return the schedules that no other schedule beats in both error and cost, the cheapest first.

    The schedule with only full calls comes last, even if its error is no smaller.
    """
    front: list[ScoredSchedule] = []
    distinct = {schedule.cuts: schedule for schedule in schedules}
    for schedule in sorted(distinct.values(), key=lambda schedule: (schedule.cost, schedule.error)):
        if not front or schedule.error < front[-1].error or len(schedule.full) == len(schedule.cuts):
            front.append(schedule)
    return front


def _prices(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, count: int
) -> list[float]:
    """Return zero, and quantiles of the prices at which a call changes from one cut to another."""
    pairs = [
        (cheap, expensive)
        for cheap, expensive in itertools.combinations(_cheapest_first(errors, ratios), 2)
        if ratios[expensive] > ratios[cheap]
    ]
    thresholds = [np.empty(0)]
    for last in range(calls):
        before = max(0, last - max(1, longest // 4)) if last else None
        by_cut = {name: segment(last, before, min(calls, last + longest)) for name, segment in errors.items()}
        thresholds += [
            (by_cut[cheap] - by_cut[expensive]) / (ratios[expensive] - ratios[cheap]) for cheap, expensive in pairs
        ]
    positive = np.concatenate(thresholds)
    positive = positive[positive > 0]
    return [0.0, *np.quantile(positive, np.linspace(0, 1, count)).tolist()] if positive.size else [0.0]


def _cheapest_first(errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float]) -> list[str]:
    return sorted(errors, key=lambda name: ratios[name])
