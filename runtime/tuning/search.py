"""Which calls should be full: dynamic programming over the errors of predictions and the engines' times.

A schedule is a chain of full calls. What the calls between two of them miss depends on these and, where predictions
have a slope, on the one before: the state is the last two full calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

SegmentErrors = Callable[[int, "int | None", int], Array]
"""``(last, before, until)``: what each of the calls after ``last`` and before ``until`` would miss, weighted."""


@dataclass(frozen=True)
class Found:
    """A schedule.

    Attributes:
        full: its full calls.
        error: the sum of its weighted errors.
        cost: in full calls' time.
        cuts: of each call, None for a full one; empty where nobody said what cut there is.
    """

    full: tuple[int, ...]
    error: float
    cost: float
    cuts: tuple[str | None, ...] = ()


def evaluate(full: Sequence[int], calls: int, errors: SegmentErrors, shallow_cost: float) -> Found:
    """The error and the cost of a schedule.

    Args:
        full: its full calls, 0 first, in order.
        shallow_cost: of a shallow call, in full calls.
    """
    total = 0.0
    for index, last in enumerate(full):
        until = full[index + 1] if index + 1 < len(full) else calls
        total += float(errors(last, full[index - 1] if index else None, until).sum())
    return Found(tuple(full), total, len(full) + shallow_cost * (calls - len(full)))


def best_of_each(calls: int, errors: SegmentErrors, shallow_cost: float, longest: int) -> list[Found]:
    """For every number of full calls the schedule with the least error, the fewest first.

    Args:
        calls: of a generation.
        shallow_cost: of a shallow call, in full calls.
        longest: calls from one full call to the next, at most.
    """
    # For the last two full calls: the least error from there on with k more full calls, and where the next one is.
    least: dict[tuple[int, int | None], tuple[Array, npt.NDArray[np.intp]]] = {}
    for last in range(calls - 1, -1, -1):
        earlier: list[int | None] = [None] if last == 0 else list(range(max(0, last - longest), last))
        for before in earlier:
            end = min(calls, last + longest)
            missed = np.concatenate([[0.0], np.cumsum(errors(last, before, end))])
            options = np.full((end - last, calls), np.inf)
            for until in range(last + 1, end + 1):
                if until == calls:
                    options[until - last - 1, 0] = missed[-1]
                else:
                    options[until - last - 1, 1:] = missed[until - last - 1] + least[until, last][0][:-1]
            least[last, before] = options.min(0), options.argmin(0) + last + 1
    found = []
    for more in range(calls):
        if not np.isfinite(least[0, None][0][more]):
            continue
        chain, last, before = [0], 0, None
        for left in range(more, 0, -1):
            last, before = int(least[last, before][1][left]), last
            chain.append(last)
        found.append(evaluate(chain, calls, errors, shallow_cost))
    return found


def within(found: Sequence[Found], budget: float) -> Found:
    """Of the schedules within a budget, in full calls, that with the least error; the cheapest if there is none."""
    affordable = [each for each in found if each.cost <= budget + 1e-9]
    return min(affordable, key=lambda each: each.error) if affordable else min(found, key=lambda each: each.cost)


def last_two(full: Sequence[int], call: int) -> tuple[int, int | None]:
    """The last full call before a shallow one, and the full call before that."""
    earlier = [each for each in full if each < call]
    return earlier[-1], earlier[-2] if len(earlier) > 1 else None


def cachequant(calls: int, interval: int, differences: Callable[[int, int], float]) -> tuple[int, ...]:
    """CacheQuant's schedule (CVPR 2025): K = ceil(calls / interval) segments of least total difference.

    ``M(n, k) = min over j of M(j, k - 1) + D(j, n)``, where ``D(s, e)`` sums how far the features of the calls from s
    to e - 1 are from that of s, and a segment has ceil(interval / 2) to 2 * interval calls.

    Args:
        calls: of a generation.
        differences: ``D``.
    """
    count = math.ceil(calls / interval)
    shortest, longest = math.ceil(interval / 2), 2 * interval
    least: list[dict[int, tuple[float, int]]] = [{0: (0.0, -1)}]
    for _ in range(count):
        row: dict[int, tuple[float, int]] = {}
        for begin, (sum_so_far, _) in least[-1].items():
            for end in range(begin + shortest, min(begin + longest, calls) + 1):
                value = sum_so_far + differences(begin, end)
                if end not in row or value < row[end][0]:
                    row[end] = value, begin
        least.append(row)
    if calls not in least[count]:  # the last segment of an odd number of calls may have to be shorter
        return tuple(range(0, calls, interval))
    chain: list[int] = []
    end = calls
    for number in range(count, 0, -1):
        end = least[number][end][1]
        chain.append(end)
    return tuple(reversed(chain))
