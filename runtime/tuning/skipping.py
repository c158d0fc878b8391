"""Search for schedules with skipped calls, which run no engine: number and places of full and shallow calls.

The noise predictions of a sampler change smoothly from call to call. A fitted correction (``lockstep``) can continue
them, so that many calls need no engine and the saved time pays for more full calls. The error of such a schedule cannot
be computed in advance, so the search generates images with each candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from ..generation.schedule import SKIP
from .artifact import Tuned
from .candidates import CandidateJudge
from .recording import OnStage
from .search import CallCosts, CutsByCall, ScoredSchedule, cost_in_full_calls, full_calls

_LOWEST_SHARE = 0.6
"""Smallest number of full calls to try, as a share of the largest number within the budget. In experiments, with fewer
full calls more shallow calls did not make up for them."""

_PATIENCE = 2
"""Number of consecutive worse results after which the search stops to reduce the number of full calls."""

_MOVES = 16
"""Largest number of schedules to try with one full call moved."""


def search_skipping(
    cut: str,
    budget: float,
    costs: CallCosts,
    judge: CandidateJudge,
    make: Callable[[CutsByCall], Tuned],
    schedules: Sequence[ScoredSchedule],
    on_stage: OnStage,
) -> Tuned:
    """Return the best schedule within a budget whose calls are full, shallow at one cut, or skipped.

    Args:
        cut: cut of the shallow calls.
        budget: time of a generation, in units of a full call's time.
        costs: durations of the engine's calls.
        judge: compares schedules.
        make: function that returns the schedule with these cuts by call, predictions and a correction.
        schedules: schedules without skipped calls, whose full calls are tried, too.
        on_stage: called with lines of progress.
    """
    calls = costs.calls
    made: dict[CutsByCall, Tuned] = {}

    def make_once(cuts: CutsByCall) -> Tuned:
        if cuts not in made:
            made[cuts] = make(cuts)
        return made[cuts]

    best, worse = None, 0
    for options in within_budget(calls, budget, costs.ratios[cut], cut):
        on_stage(f"  {len(full_calls(options[0]))} full calls")
        tuned = judge.best([make_once(cuts) for cuts in options])
        if best is None or judge.best([best, tuned]) is tuned:
            best, worse = tuned, 0
        else:
            worse += 1
        if worse == _PATIENCE:
            break
    assert best is not None
    shallow, count = best.document.by_call.count(cut), len(best.document.full)

    def with_full(full: tuple[int, ...]) -> Tuned:
        return make_once(spread_shallow_calls(full, calls, shallow, cut))

    placements = [schedule.full for schedule in schedules if len(schedule.full) == count]
    placements.append(midpoints(evenly_spaced(calls, count), spaced_to_last_call(calls, count)))
    best = judge.best([best, *(with_full(full) for full in placements)])
    return _move_full_calls(best, calls, judge, with_full, on_stage)


def _move_full_calls(
    best: Tuned, calls: int, judge: CandidateJudge, with_full: Callable[[tuple[int, ...]], Tuned], on_stage: OnStage
) -> Tuned:
    """Move one full call after another as long as the PSNR becomes significantly better, and return the best schedule.

    Args:
        with_full: function that returns the schedule with these full calls.
    """
    tried, before = {best.document.full}, None
    while before is not best and len(tried) <= _MOVES:
        before = best
        for place, by in itertools.product(range(1, len(best.document.full)), (-1, 1)):
            while (full := with_call_moved(best.document.full, calls, place, by)) is not None:
                if full in tried or len(tried) > _MOVES:
                    break
                tried.add(full)
                on_stage(f"  move full call {place + 1}")
                if not judge.significantly_better(candidate := with_full(full), best):
                    break
                best = candidate
    return best


def evenly_spaced(calls: int, count: int) -> tuple[int, ...]:
    """Return full calls at equal distances, 0 first; the end has the same distance from the last full call.

    >>> evenly_spaced(20, 6)
    (0, 3, 7, 10, 13, 17)
    """
    return tuple(round(calls * place / count) for place in range(count))


def spaced_to_last_call(calls: int, count: int) -> tuple[int, ...]:
    """Return full calls at equal distances, of which the last call is one; a single full call is call 0.

    >>> spaced_to_last_call(20, 6)
    (0, 4, 8, 11, 15, 19)
    """
    return tuple(round((calls - 1) * place / max(1, count - 1)) for place in range(count))


def midpoints(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """Return full calls halfway between those of two schedules with the same number of full calls.

    >>> midpoints((0, 5, 10), (0, 6, 12))
    (0, 6, 11)
    """
    return tuple((first + second + 1) // 2 for first, second in zip(one, other, strict=True))


def with_call_moved(full: Sequence[int], calls: int, place: int, by: int) -> tuple[int, ...] | None:
    """Return the full calls with one of them moved by some calls; None if it would meet another one or an end.

    >>> with_call_moved((0, 4, 8), 10, 1, -1)
    (0, 3, 8)
    """
    call = full[place] + by
    after = full[place + 1] if place + 1 < len(full) else calls
    return (*full[:place], call, *full[place + 1 :]) if place > 0 and full[place - 1] < call < after else None


def spread_shallow_calls(full: Sequence[int], calls: int, shallow: int, cut: str) -> CutsByCall:
    """Return the cut of each call: shallow calls go to the widest gaps between full calls, other calls are skipped.

    >>> spread_shallow_calls((0, 4), 8, 3, "deepcache:0")
    (None, 'deepcache:0', 'deepcache:0', 'skip', None, 'skip', 'deepcache:0', 'skip')
    """
    gaps = list(itertools.pairwise((*full, calls)))
    shallow_in_gap = [0] * len(gaps)

    def spacing(gap: int) -> float:
        begin, end = gaps[gap]
        count = shallow_in_gap[gap]
        return (end - begin) / (count + 1) if count < end - begin - 1 else 0.0

    for _ in range(min(shallow, calls - len(full))):
        shallow_in_gap[max(range(len(gaps)), key=lambda gap: (spacing(gap), -gap))] += 1
    cuts: list[str | None] = [SKIP] * calls
    for (begin, end), count in zip(gaps, shallow_in_gap, strict=True):
        cuts[begin] = None
        for place in range(1, count + 1):
            cuts[begin + place * (end - begin) // (count + 1)] = cut
    return tuple(cuts)


def within_budget(calls: int, budget: float, ratio: float, cut: str) -> Iterator[tuple[CutsByCall, ...]]:
    """Yield schedules with evenly spaced full calls, and shallow calls for the rest of the budget.

    The number of full calls falls from the largest within the budget. For each number there are two schedules, with and
    without a full call at the end: a full last call may be better than one that depends on the correction.

    Yields:
        Cuts by call of these two schedules; of one if both are the same.

    Args:
        calls: number of calls of a generation.
        budget: time of a generation, in units of a full call's time.
        ratio: time of a shallow call divided by a full call's.
        cut: cut of the shallow calls.
    """
    most = max(1, min(int(budget + 1e-9), calls))
    for count in range(most, max(1, round(_LOWEST_SHARE * most)) - 1, -1):
        shallow = min(int((budget - count) / ratio + 1e-9), calls - count)
        yield tuple(
            dict.fromkeys(
                spread_shallow_calls(spaced(calls, count), calls, shallow, cut)
                for spaced in (evenly_spaced, spaced_to_last_call)
            )
        )
        if count + shallow == calls:  # with fewer full calls some budget would be unused
            return


def skipping_schedules(calls: int, ratio: float, cut: str) -> list[ScoredSchedule]:
    """Return for every number of full calls a schedule with a shallow call in the middle of each gap.

    The cheapest schedule comes first; the last one has only full calls. Errors are unknown and set to 0.
    """
    schedules = []
    for count in range(2, calls + 1):
        cuts = spread_shallow_calls(evenly_spaced(calls, count), calls, count, cut)
        schedules.append(ScoredSchedule(full_calls(cuts), 0.0, cost_in_full_calls(cuts, {cut: ratio}), cuts))
    return schedules
