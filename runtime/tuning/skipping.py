"""Schedules in which some calls run no engine, to be tried: how many calls are full, and where the shallow ones lie.

The answers that a sampler gets move along a smooth path. Where a correction is fitted to continue it (``lockstep``),
many calls need no engine, and the time goes into full calls that lie closer. How good that is follows from no error
that is known before, so these are tried.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from ..generation.schedule import SKIP
from .cuts import ByCall, cost_of, full_of
from .search import Found

_LOWEST_SHARE = 0.6
"""Of the most full calls within a budget: with fewer, more shallow calls have not been seen to make up for them."""


def evenly(calls: int, count: int) -> tuple[int, ...]:
    """So many full calls at equal distances, 0 first; what follows the last of them is such a distance too.

    >>> evenly(20, 6)
    (0, 3, 7, 10, 13, 17)
    """
    return tuple(round(calls * place / count) for place in range(count))


def to_the_end(calls: int, count: int) -> tuple[int, ...]:
    """The same, a little further apart, so that the last call is full; the only one is the first.

    >>> to_the_end(20, 6)
    (0, 4, 8, 11, 15, 19)
    """
    return tuple(round((calls - 1) * place / max(1, count - 1)) for place in range(count))


def between(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    """As many full calls half-way from those of one schedule to those of another.

    >>> between((0, 5, 10), (0, 6, 12))
    (0, 6, 11)
    """
    return tuple((first + second + 1) // 2 for first, second in zip(one, other, strict=True))


def moved(full: Sequence[int], calls: int, place: int, by: int) -> tuple[int, ...] | None:
    """The same with one full call earlier or later; None where another one or an end is in the way.

    >>> moved((0, 4, 8), 10, 1, -1)
    (0, 3, 8)
    """
    at = full[place] + by
    after = full[place + 1] if place + 1 < len(full) else calls
    return (*full[:place], at, *full[place + 1 :]) if place > 0 and full[place - 1] < at < after else None


def mixed(full: Sequence[int], calls: int, shallow: int, cut: str) -> ByCall:
    """Between these full calls so many shallow ones, evenly over the widest gaps; the others run no engine.

    >>> mixed((0, 4), 8, 3, "deepcache:0")
    (None, 'deepcache:0', 'deepcache:0', 'skip', None, 'skip', 'deepcache:0', 'skip')
    """
    gaps = list(itertools.pairwise((*full, calls)))
    each = [0] * len(gaps)

    def crowded(gap: int) -> float:
        begin, end = gaps[gap]
        return (end - begin) / (each[gap] + 1) if each[gap] < end - begin - 1 else 0.0

    for _ in range(min(shallow, calls - len(full))):
        each[max(range(len(gaps)), key=lambda gap: (crowded(gap), -gap))] += 1
    made: list[str | None] = [SKIP] * calls
    for (begin, end), count in zip(gaps, each, strict=True):
        made[begin] = None
        for place in range(1, count + 1):
            made[begin + place * (end - begin) // (count + 1)] = cut
    return tuple(made)


def within_budget(calls: int, budget: float, ratio: float, cut: str) -> Iterator[tuple[ByCall, ...]]:
    """Evenly spaced full calls, from as many as the budget allows downwards, and the shallow calls that it leaves.

    Yields:
        For each number of full calls two schedules, or one where both are the same: what ends with a call that runs no
        engine is left to the correction, and a full call there may be worth more than closer ones before.

    Args:
        budget: in full calls' time.
        ratio: of a shallow call's time to a full one's.
    """
    most = max(1, min(int(budget + 1e-9), calls))
    for count in range(most, max(1, round(_LOWEST_SHARE * most)) - 1, -1):
        shallow = min(int((budget - count) / ratio + 1e-9), calls - count)
        yield tuple(dict.fromkeys(mixed(spaced(calls, count), calls, shallow, cut) for spaced in (evenly, to_the_end)))
        if count + shallow == calls:  # fewer full calls than that leave time over
            return


def ladder(calls: int, ratio: float, cut: str) -> list[Found]:
    """For every number of full calls one schedule, the cheapest first: a shallow call amid each gap; last all full.

    Their errors are not known.
    """
    found = []
    for count in range(2, calls + 1):
        cuts = mixed(evenly(calls, count), calls, count, cut)
        found.append(Found(full_of(cuts), 0.0, cost_of(cuts, {cut: ratio}), cuts))
    return found
