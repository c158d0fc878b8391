"""The search beside brute force: the best of all schedules, and CacheQuant's recurrence."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.runtime.tuning.search import Array, best_of_each, cachequant, evaluate, within

CALLS = 7


def random_errors(seed: int):  # type: ignore[no-untyped-def]
    table = np.random.default_rng(seed).random((CALLS + 1, CALLS + 1, CALLS + 1))

    def errors(last: int, before: int | None, until: int) -> Array:
        place = CALLS if before is None else before
        return np.cumsum(table[place, last, last + 1 : until])

    return errors


def chains(longest: int = CALLS) -> list[tuple[int, ...]]:
    every = [(0, *rest) for size in range(CALLS) for rest in itertools.combinations(range(1, CALLS), size)]
    return [each for each in every if all(b - a <= longest for a, b in itertools.pairwise((*each, CALLS)))]


@given(st.integers(0, 10**6), st.floats(0.0, 0.5), st.integers(2, CALLS))
@settings(max_examples=60, deadline=None)
def test_dynamic_programming_finds_the_best_of_all(seed: int, shallow: float, longest: int) -> None:
    errors = random_errors(seed)
    every = [evaluate(each, CALLS, errors, shallow) for each in chains(longest)]
    found = best_of_each(CALLS, errors, shallow, longest)
    assert [len(each.full) for each in found] == sorted({len(each.full) for each in every})
    for each in found:
        least = min(other.error for other in every if len(other.full) == len(each.full))
        assert each.error == pytest.approx(least)
        assert each.cost == pytest.approx(len(each.full) + shallow * (CALLS - len(each.full)))


@given(st.integers(0, 10**6), st.floats(0.5, 8.0))
@settings(max_examples=30, deadline=None)
def test_a_budget_is_kept(seed: int, budget: float) -> None:
    found = best_of_each(CALLS, random_errors(seed), 0.1, CALLS)
    chosen = within(found, budget)
    affordable = [each for each in found if each.cost <= budget]
    assert chosen.error == min((each.error for each in affordable), default=found[0].error)
    assert chosen.cost <= max(budget, found[0].cost) + 1e-9


def brute_cachequant(calls: int, interval: int, difference):  # type: ignore[no-untyped-def]
    count = math.ceil(calls / interval)
    best = None
    for rest in itertools.combinations(range(1, calls), count - 1):
        chain = (0, *rest, calls)
        lengths = [b - a for a, b in itertools.pairwise(chain)]
        if min(lengths) >= math.ceil(interval / 2) and max(lengths) <= 2 * interval:
            total = sum(difference(a, b) for a, b in itertools.pairwise(chain))
            if best is None or total < best[0] - 1e-12:
                best = total, chain[:-1]
    return best


@given(st.integers(4, 11), st.integers(2, 4), st.integers(0, 1000))
@settings(max_examples=60, deadline=None)
def test_cachequants_recurrence_is_its_definition(calls: int, interval: int, seed: int) -> None:
    features = np.random.default_rng(seed).random((calls, 5)).cumsum(0)

    def difference(begin: int, end: int) -> float:
        return float(sum(np.abs(features[call] - features[begin]).sum() for call in range(begin, end)))

    found = cachequant(calls, interval, difference)
    best = brute_cachequant(calls, interval, difference)
    if best is None:
        assert found == tuple(range(0, calls, interval))
        return
    ends = [*found[1:], calls]
    assert sum(difference(a, b) for a, b in zip(found, ends, strict=True)) == pytest.approx(best[0])
    assert len(found) == math.ceil(calls / interval)
