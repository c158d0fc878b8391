"""The search compared with brute force: with one cut, with several cuts, and CacheQuant's recurrence."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.runtime.tuning.report import cachequant
from offcut.runtime.tuning.search import (
    Array,
    ScoredSchedule,
    best_at_price,
    best_by_count,
    best_within,
    cost_in_full_calls,
    cuts_with,
    evaluate,
    full_calls,
    pareto_front,
    search_schedules,
)

CALLS = 7
CUT_CALLS = 6
"""Number of calls in tests with several cuts, which have more schedules to enumerate."""


def random_errors(seed: int):  # type: ignore[no-untyped-def]
    table = np.random.default_rng(seed).random((CALLS + 1, CALLS + 1, CALLS + 1))

    def errors(last: int, before: int | None, until: int) -> Array:
        place = CALLS if before is None else before
        return np.cumsum(table[place, last, last + 1 : until])

    return errors


def chains(longest: int = CALLS) -> list[tuple[int, ...]]:
    all_schedules = [(0, *rest) for size in range(CALLS) for rest in itertools.combinations(range(1, CALLS), size)]
    return [chain for chain in all_schedules if all(b - a <= longest for a, b in itertools.pairwise((*chain, CALLS)))]


@given(st.integers(0, 10**6), st.floats(0.0, 0.5), st.integers(2, CALLS))
@settings(max_examples=60, deadline=None)
def test_dynamic_programming_finds_the_best_schedule(seed: int, shallow: float, longest: int) -> None:
    errors = random_errors(seed)
    all_schedules = [evaluate(schedule, CALLS, errors, shallow) for schedule in chains(longest)]
    schedules = best_by_count(CALLS, errors, shallow, longest)
    assert [len(schedule.full) for schedule in schedules] == sorted({len(schedule.full) for schedule in all_schedules})
    for schedule in schedules:
        least = min(other.error for other in all_schedules if len(other.full) == len(schedule.full))
        assert schedule.error == pytest.approx(least)
        assert schedule.cost == pytest.approx(len(schedule.full) + shallow * (CALLS - len(schedule.full)))


@given(st.integers(0, 10**6), st.floats(0.5, 8.0))
@settings(max_examples=30, deadline=None)
def test_the_schedule_is_within_the_budget(seed: int, budget: float) -> None:
    schedules = best_by_count(CALLS, random_errors(seed), 0.1, CALLS)
    chosen = best_within(schedules, budget)
    affordable = [schedule for schedule in schedules if schedule.cost <= budget]
    assert chosen.error == min((schedule.error for schedule in affordable), default=schedules[0].error)
    assert chosen.cost <= max(budget, schedules[0].cost) + 1e-9


def brute_force_cachequant(calls: int, interval: int, difference):  # type: ignore[no-untyped-def]
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
def test_cachequants_recurrence_matches_its_definition(calls: int, interval: int, seed: int) -> None:
    features = np.random.default_rng(seed).random((calls, 5)).cumsum(0)

    def difference(begin: int, end: int) -> float:
        return float(sum(np.abs(features[call] - features[begin]).sum() for call in range(begin, end)))

    schedules = cachequant(calls, interval, difference)
    best = brute_force_cachequant(calls, interval, difference)
    if best is None:
        assert schedules == tuple(range(0, calls, interval))
        return
    ends = [*schedules[1:], calls]
    assert sum(difference(a, b) for a, b in zip(schedules, ends, strict=True)) == pytest.approx(best[0])
    assert len(schedules) == math.ceil(calls / interval)


class RandomCuts:
    """Random errors and costs of cuts; more expensive cuts mostly have smaller errors."""

    def __init__(self, seed: int, cuts: int) -> None:
        random = np.random.default_rng(seed)
        self.names = [f"cut {number}" for number in range(cuts)]
        self.ratios = dict(zip(self.names, random.random(cuts) * 0.8, strict=True))
        shape = (CUT_CALLS + 1, CUT_CALLS, CUT_CALLS)
        self.tables = {name: random.random(shape) * (1.2 - self.ratios[name]) for name in self.names}

    @property
    def errors(self):  # type: ignore[no-untyped-def]
        def errors_of(table: Array):  # type: ignore[no-untyped-def]
            def errors(last: int, before: int | None, until: int) -> Array:
                return np.asarray(np.cumsum(table[CUT_CALLS if before is None else before, last, last + 1 : until]))

            return errors

        return {name: errors_of(table) for name, table in self.tables.items()}

    def score(self, cuts: tuple[str | None, ...]) -> ScoredSchedule:
        """Return the schedule with its error and cost, summed call by call."""
        full = [call for call, cut in enumerate(cuts) if cut is None]
        error, cost = 0.0, 0.0
        for call, cut in enumerate(cuts):
            if cut is None:
                cost += 1
                continue
            earlier = [other for other in full if other < call]
            before = earlier[-2] if len(earlier) > 1 else CUT_CALLS
            error += float(self.tables[cut][before, earlier[-1], earlier[-1] + 1 : call + 1].sum())
            cost += self.ratios[cut]
        return ScoredSchedule(tuple(full), error, cost, cuts)

    def all_schedules(self, longest: int = CUT_CALLS) -> Iterator[ScoredSchedule]:
        for rest in itertools.product([None, *self.names], repeat=CUT_CALLS - 1):
            cuts = (None, *rest)
            if all(b - a <= longest for a, b in itertools.pairwise((*full_calls(cuts), CUT_CALLS))):
                yield self.score(cuts)


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.0, 5.0), st.integers(2, CUT_CALLS))
@settings(max_examples=25, deadline=None)
def test_no_schedule_is_better_at_a_price(seed: int, count: int, price: float, longest: int) -> None:
    random_cuts = RandomCuts(seed, count)
    all_schedules = list(random_cuts.all_schedules(longest))
    schedules = best_at_price(CUT_CALLS, random_cuts.errors, random_cuts.ratios, longest, price)
    assert [len(schedule.full) for schedule in schedules] == sorted({len(schedule.full) for schedule in all_schedules})
    for schedule in schedules:
        plain = random_cuts.score(schedule.cuts)
        assert (schedule.full, schedule.cuts) == (plain.full, plain.cuts)
        assert schedule.error == pytest.approx(plain.error)
        assert schedule.cost == pytest.approx(plain.cost)
        least = min(
            other.error + price * other.cost for other in all_schedules if len(other.full) == len(schedule.full)
        )
        assert schedule.error + price * schedule.cost == pytest.approx(least)


@given(st.integers(0, 10**6), st.integers(2, 3), st.floats(0.5, CUT_CALLS))
@settings(max_examples=25, deadline=None)
def test_the_schedule_is_within_the_budget_and_better_than_with_a_single_cut(
    seed: int, count: int, budget: float
) -> None:
    random_cuts = RandomCuts(seed, count)
    schedules = search_schedules(CUT_CALLS, random_cuts.errors, random_cuts.ratios, CUT_CALLS)
    chosen = best_within(schedules, budget)
    cheapest = min(schedule.cost for schedule in random_cuts.all_schedules())
    assert schedules[0].cost == pytest.approx(cheapest)
    assert chosen.cost <= max(budget, cheapest) + 1e-9
    best = min(
        (schedule.error for schedule in random_cuts.all_schedules() if schedule.cost <= budget + 1e-9), default=None
    )
    if best is not None:
        assert chosen.error >= best - 1e-9
        for name in random_cuts.names:
            alone = best_by_count(CUT_CALLS, random_cuts.errors[name], random_cuts.ratios[name], CUT_CALLS)
            reached = [schedule.error for schedule in alone if schedule.cost <= budget]
            assert chosen.error <= min(reached, default=np.inf) + 1e-9


@given(st.integers(0, 10**6), st.integers(2, 3))
@settings(max_examples=25, deadline=None)
def test_errors_fall_along_the_front_and_its_end_has_no_shallow_call(seed: int, count: int) -> None:
    random_cuts = RandomCuts(seed, count)
    schedules = search_schedules(CUT_CALLS, random_cuts.errors, random_cuts.ratios, CUT_CALLS)
    for schedule, dearer in itertools.pairwise(schedules):
        assert schedule.cost <= dearer.cost
        assert schedule.error > dearer.error or len(dearer.full) == CUT_CALLS
    assert schedules[-1].full == tuple(range(CUT_CALLS))
    for schedule in schedules:
        assert schedule.error == pytest.approx(random_cuts.score(schedule.cuts).error)


@given(st.integers(0, 10**6), st.integers(2, CUT_CALLS))
@settings(max_examples=25, deadline=None)
def test_the_search_with_one_cut_equals_the_search_without_cuts(seed: int, longest: int) -> None:
    random_cuts = RandomCuts(seed, 1)
    (name,) = random_cuts.names
    plain = best_by_count(CUT_CALLS, random_cuts.errors[name], random_cuts.ratios[name], longest)
    schedules = search_schedules(CUT_CALLS, random_cuts.errors, random_cuts.ratios, longest)
    assert [(schedule.full, schedule.error, schedule.cost) for schedule in schedules] == [
        (schedule.full, schedule.error, schedule.cost) for schedule in plain
    ]
    assert [schedule.cuts for schedule in schedules] == [
        cuts_with(schedule.full, CUT_CALLS, name) for schedule in plain
    ]
    priced = best_at_price(CUT_CALLS, random_cuts.errors, random_cuts.ratios, longest, 3.0)
    assert [(schedule.full, schedule.cuts) for schedule in priced] == [
        (schedule.full, schedule.cuts) for schedule in schedules
    ]


def test_only_calls_that_gain_from_an_expensive_cut_get_it() -> None:
    gains = np.array([0.0, 0.9, 0.0, 0.9, 0.0, 0.9])

    def cheap(last: int, before: int | None, until: int) -> Array:
        return np.asarray(0.1 + gains[last + 1 : until])

    def expensive(last: int, before: int | None, until: int) -> Array:
        return np.full(until - last - 1, 0.1)

    ratios = {"cheap": 0.1, "expensive": 0.4}
    schedules = search_schedules(CUT_CALLS, {"cheap": cheap, "expensive": expensive}, ratios, CUT_CALLS)
    chosen = best_within(schedules, 1 + 2 * 0.1 + 3 * 0.4 + 1e-6)
    assert chosen.cuts == (None, "expensive", "cheap", "expensive", "cheap", "expensive")
    assert chosen.error == pytest.approx(0.5)
    alone = best_by_count(CUT_CALLS, cheap, 0.1, CUT_CALLS)
    assert chosen.error < best_within(alone, chosen.cost).error


def test_a_cut_with_higher_cost_and_error_is_never_chosen() -> None:
    random_cuts = RandomCuts(1, 1)
    (name,) = random_cuts.names

    def worse(last: int, before: int | None, until: int) -> Array:
        return np.asarray(random_cuts.errors[name](last, before, until) + 0.1)

    errors, ratios = (
        {"worse": worse, name: random_cuts.errors[name]},
        {"worse": random_cuts.ratios[name] + 0.1, **random_cuts.ratios},
    )
    assert all("worse" not in schedule.cuts for schedule in search_schedules(CUT_CALLS, errors, ratios, CUT_CALLS))


def test_costs_and_full_calls_of_mixed_cuts() -> None:
    cuts = (None, "a", "b", None, "a")
    assert full_calls(cuts) == (0, 3)
    assert cost_in_full_calls(cuts, {"a": 0.25, "b": 0.5}) == pytest.approx(3.0)
    assert cuts_with((0, 2), 4, "a") == (None, "a", None, "a")


def test_the_front_has_no_duplicates() -> None:
    one = ScoredSchedule((0,), 1.0, 1.5, (None, "a"))
    whole = ScoredSchedule((0, 1), 0.0, 2.0, (None, None))
    assert pareto_front([whole, one, one, whole]) == [one, whole]
