"""The search over cuts beside brute force: all chains of full calls with all cuts of the calls between them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.runtime.tuning.cuts import at_cut, at_price, cost_of, front, full_of, search
from offcut.runtime.tuning.search import Array, Found, best_of_each, within

CALLS = 6


class Case:
    """Cuts with errors at random, those further in mostly smaller, and what each costs."""

    def __init__(self, seed: int, cuts: int) -> None:
        random = np.random.default_rng(seed)
        self.names = [f"cut {number}" for number in range(cuts)]
        self.ratios = dict(zip(self.names, random.random(cuts) * 0.8, strict=True))
        shape = (CALLS + 1, CALLS, CALLS)
        self.tables = {name: random.random(shape) * (1.2 - self.ratios[name]) for name in self.names}

    @property
    def errors(self):  # type: ignore[no-untyped-def]
        def of(table: Array):  # type: ignore[no-untyped-def]
            def errors(last: int, before: int | None, until: int) -> Array:
                return np.asarray(np.cumsum(table[CALLS if before is None else before, last, last + 1 : until]))

            return errors

        return {name: of(table) for name, table in self.tables.items()}

    def plainly(self, cuts: tuple[str | None, ...]) -> Found:
        """A schedule's error and cost, call by call."""
        full = [call for call, cut in enumerate(cuts) if cut is None]
        error, cost = 0.0, 0.0
        for call, cut in enumerate(cuts):
            if cut is None:
                cost += 1
                continue
            earlier = [each for each in full if each < call]
            before = earlier[-2] if len(earlier) > 1 else CALLS
            error += float(self.tables[cut][before, earlier[-1], earlier[-1] + 1 : call + 1].sum())
            cost += self.ratios[cut]
        return Found(tuple(full), error, cost, cuts)

    def all(self, longest: int = CALLS) -> Iterator[Found]:
        for rest in itertools.product([None, *self.names], repeat=CALLS - 1):
            cuts = (None, *rest)
            if all(b - a <= longest for a, b in itertools.pairwise((*full_of(cuts), CALLS))):
                yield self.plainly(cuts)


@given(st.integers(0, 10**6), st.integers(1, 3), st.floats(0.0, 5.0), st.integers(2, CALLS))
@settings(max_examples=25, deadline=None)
def test_at_a_price_nothing_is_better(seed: int, count: int, price: float, longest: int) -> None:
    case = Case(seed, count)
    every = list(case.all(longest))
    found = at_price(CALLS, case.errors, case.ratios, longest, price)
    assert [len(each.full) for each in found] == sorted({len(each.full) for each in every})
    for each in found:
        plain = case.plainly(each.cuts)
        assert (each.full, each.cuts) == (plain.full, plain.cuts)
        assert each.error == pytest.approx(plain.error)
        assert each.cost == pytest.approx(plain.cost)
        least = min(other.error + price * other.cost for other in every if len(other.full) == len(each.full))
        assert each.error + price * each.cost == pytest.approx(least)


@given(st.integers(0, 10**6), st.integers(2, 3), st.floats(0.5, CALLS))
@settings(max_examples=25, deadline=None)
def test_a_budget_is_kept_and_no_cut_alone_is_better(seed: int, count: int, budget: float) -> None:
    case = Case(seed, count)
    found = search(CALLS, case.errors, case.ratios, CALLS)
    chosen = within(found, budget)
    cheapest = min(each.cost for each in case.all())
    assert found[0].cost == pytest.approx(cheapest)
    assert chosen.cost <= max(budget, cheapest) + 1e-9
    best = min((each.error for each in case.all() if each.cost <= budget + 1e-9), default=None)
    if best is not None:
        assert chosen.error >= best - 1e-9
        for name in case.names:
            alone = best_of_each(CALLS, case.errors[name], case.ratios[name], CALLS)
            reached = [each.error for each in alone if each.cost <= budget]
            assert chosen.error <= min(reached, default=np.inf) + 1e-9


@given(st.integers(0, 10**6), st.integers(2, 3))
@settings(max_examples=25, deadline=None)
def test_the_front_rises_and_ends_without_shallow_calls(seed: int, count: int) -> None:
    case = Case(seed, count)
    found = search(CALLS, case.errors, case.ratios, CALLS)
    for each, dearer in itertools.pairwise(found):
        assert each.cost <= dearer.cost
        assert each.error > dearer.error or len(dearer.full) == CALLS
    assert found[-1].full == tuple(range(CALLS))
    for each in found:
        assert each.error == pytest.approx(case.plainly(each.cuts).error)


@given(st.integers(0, 10**6), st.integers(2, CALLS))
@settings(max_examples=25, deadline=None)
def test_one_cut_is_the_search_without_cuts(seed: int, longest: int) -> None:
    case = Case(seed, 1)
    (name,) = case.names
    plain = best_of_each(CALLS, case.errors[name], case.ratios[name], longest)
    found = search(CALLS, case.errors, case.ratios, longest)
    assert [(each.full, each.error, each.cost) for each in found] == [
        (each.full, each.error, each.cost) for each in plain
    ]
    assert [each.cuts for each in found] == [at_cut(each.full, CALLS, name) for each in plain]
    priced = at_price(CALLS, case.errors, case.ratios, longest, 3.0)
    assert [(each.full, each.cuts) for each in priced] == [(each.full, each.cuts) for each in found]


def test_calls_that_gain_by_a_dear_cut_get_it_and_others_do_not() -> None:
    gains = np.array([0.0, 0.9, 0.0, 0.9, 0.0, 0.9])

    def cheap(last: int, before: int | None, until: int) -> Array:
        return np.asarray(0.1 + gains[last + 1 : until])

    def dear(last: int, before: int | None, until: int) -> Array:
        return np.full(until - last - 1, 0.1)

    ratios = {"cheap": 0.1, "dear": 0.4}
    found = search(CALLS, {"cheap": cheap, "dear": dear}, ratios, CALLS)
    chosen = within(found, 1 + 2 * 0.1 + 3 * 0.4 + 1e-6)
    assert chosen.cuts == (None, "dear", "cheap", "dear", "cheap", "dear")
    assert chosen.error == pytest.approx(0.5)
    alone = best_of_each(CALLS, cheap, 0.1, CALLS)
    assert chosen.error < within(alone, chosen.cost).error


def test_a_cut_that_costs_more_and_misses_more_is_never_taken() -> None:
    case = Case(1, 1)
    (name,) = case.names

    def worse(last: int, before: int | None, until: int) -> Array:
        return np.asarray(case.errors[name](last, before, until) + 0.1)

    errors, ratios = {"worse": worse, name: case.errors[name]}, {"worse": case.ratios[name] + 0.1, **case.ratios}
    assert all("worse" not in each.cuts for each in search(CALLS, errors, ratios, CALLS))


def test_costs_and_full_calls_of_mixed_cuts() -> None:
    cuts = (None, "a", "b", None, "a")
    assert full_of(cuts) == (0, 3)
    assert cost_of(cuts, {"a": 0.25, "b": 0.5}) == pytest.approx(3.0)
    assert at_cut((0, 2), 4, "a") == (None, "a", None, "a")


def test_the_same_schedule_twice_is_one_of_the_front() -> None:
    one = Found((0,), 1.0, 1.5, (None, "a"))
    whole = Found((0, 1), 0.0, 2.0, (None, None))
    assert front([whole, one, one, whole]) == [one, whole]
