"""Which cut each shallow call takes: the search over full calls, once for each of several prices of time.

A cut further in misses less and costs more. At a price, in error per full call's time, each shallow call takes the cut
whose error and price together are least, whatever the others take; so the search finds, for every number of full calls,
the least sum of both. The schedules of all prices together have a front of error and cost, and a budget picks from it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..generation.schedule import SKIP
from .search import Array, Found, SegmentErrors, best_of_each

PRICES = 12
"""That are tried beside none; more make the front denser."""

ByCall = tuple[str | None, ...]
"""The cut of each call of a generation; None for a full one, ``SKIP`` where no engine runs."""


def at_cut(full: Sequence[int], calls: int, cut: str) -> ByCall:
    """All shallow calls at one cut."""
    return tuple(None if call in full else cut for call in range(calls))


def full_of(cuts: ByCall) -> tuple[int, ...]:
    """The full calls."""
    return tuple(call for call, cut in enumerate(cuts) if cut is None)


def cost_of(cuts: Sequence[str | None], ratios: Mapping[str, float]) -> float:
    """The time of a generation with these calls, in full calls.

    Args:
        ratios: a shallow call's time over a full one's, by cut.
    """
    counts = Counter(cuts)
    del counts[SKIP]
    return counts.pop(None, 0) + sum(ratios[cut] * count for cut, count in counts.items() if cut is not None)


def search(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, count: int = PRICES
) -> list[Found]:
    """The schedules to choose from, the cheapest first; the last has no shallow call.

    With one cut there is one for every number of full calls. With several these are the front of all that any price
    gives and of the best at each cut alone.

    Args:
        calls: of a generation.
        errors: of a segment, by cut.
        ratios: a shallow call's time over a full one's, by cut.
        longest: calls from one full call to the next, at most.
        count: of prices.
    """
    alone = [
        replace(found, cuts=at_cut(found.full, calls, cut))
        for cut, missed in errors.items()
        for found in best_of_each(calls, missed, ratios[cut], longest)
    ]
    if len(errors) == 1:
        return alone
    prices = _prices(calls, errors, ratios, longest, count)
    return front([*alone, *(each for price in prices for each in at_price(calls, errors, ratios, longest, price))])


def at_price(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, price: float
) -> list[Found]:
    """For every number of full calls the schedule with the least ``error + price * cost``; arguments as ``search``."""
    names = _cheapest_first(errors, ratios)
    dearer = price * np.array([[ratios[name] - ratios[names[0]]] for name in names])

    def every(last: int, before: int | None, until: int) -> Array:
        return np.stack([errors[name](last, before, until) for name in names])  # [cuts, calls]

    def priced(last: int, before: int | None, until: int) -> Array:
        return np.asarray((every(last, before, until) + dearer).min(0))

    made = []
    for found in best_of_each(calls, priced, ratios[names[0]], longest):
        cuts: list[str | None] = [None] * calls
        missed = 0.0
        for before, last, until in zip((None, *found.full), found.full, (*found.full[1:], calls), strict=False):
            each = every(last, before, until)
            chosen = (each + dearer).argmin(0)
            missed += float(each[chosen, np.arange(len(chosen))].sum())
            cuts[last + 1 : until] = [names[index] for index in chosen]
        made.append(Found(found.full, missed, cost_of(cuts, ratios), tuple(cuts)))
    return made


def front(found: Iterable[Found]) -> list[Found]:
    """Those that none beats in both error and cost, the cheapest first, and last the one without a shallow call."""
    kept: list[Found] = []
    different = {each.cuts: each for each in found}
    for each in sorted(different.values(), key=lambda each: (each.cost, each.error)):
        if not kept or each.error < kept[-1].error or len(each.full) == len(each.cuts):
            kept.append(each)
    return kept


def _prices(
    calls: int, errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float], longest: int, count: int
) -> list[float]:
    """None, and quantiles of those at which a call would change its cut."""
    pairs = [
        (cheap, dear)
        for cheap, dear in itertools.combinations(_cheapest_first(errors, ratios), 2)
        if ratios[dear] > ratios[cheap]
    ]
    turns = [np.empty(0)]
    for last in range(calls):
        before = max(0, last - max(1, longest // 4)) if last else None
        missed = {name: each(last, before, min(calls, last + longest)) for name, each in errors.items()}
        turns += [(missed[cheap] - missed[dear]) / (ratios[dear] - ratios[cheap]) for cheap, dear in pairs]
    positive = np.concatenate(turns)
    positive = positive[positive > 0]
    return [0.0, *np.quantile(positive, np.linspace(0, 1, count)).tolist()] if positive.size else [0.0]


def _cheapest_first(errors: Mapping[str, SegmentErrors], ratios: Mapping[str, float]) -> list[str]:
    return sorted(errors, key=lambda name: ratios[name])
