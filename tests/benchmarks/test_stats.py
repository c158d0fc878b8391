"""Intervals of ratios and differences, and their rate of false alarms."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offcut.benchmarks.stats import Estimate, by_round, difference, ratio_of_means

SECONDS = st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=8)


@given(SECONDS)
def test_a_run_does_not_differ_from_itself_in_another_order(values: list[float]) -> None:
    interval = ratio_of_means(values, values[::-1], 0.99)
    assert interval is not None
    assert not interval.excludes(1)
    assert interval.mean == 1


@given(SECONDS, st.floats(0.1, 10), SECONDS)
def test_the_interval_of_a_scaled_run_contains_the_scale(values: list[float], scale: float, other: list[float]) -> None:
    interval = ratio_of_means(values, [value * scale for value in values], 0.99)
    assert interval is not None
    assert interval.mean == pytest.approx(scale)
    assert interval.low <= interval.mean <= interval.high
    forward, backward = ratio_of_means(values, other, 0.9), ratio_of_means(other, values, 0.9)
    assert forward is not None
    assert backward is not None
    assert forward.low * backward.high == pytest.approx(1, rel=1e-6)


def test_one_round_has_no_estimate() -> None:
    assert ratio_of_means([1.0], [2.0, 2.0], 0.99) is None
    assert ratio_of_means([1.0, 1.0], [], 0.99) is None


@pytest.mark.parametrize("rounds", [3, 5])
def test_false_alarms_are_as_rare_as_the_confidence_says(rounds: int) -> None:
    """A percentile bootstrap of the medians of three rounds would fail: it is wrong in about one of eight runs."""
    chance = random.Random(7)
    trials, alarms = 2000, 0
    for _ in range(trials):
        runs = [[math.exp(chance.gauss(0, 0.02)) for _ in range(rounds)] for _ in range(2)]
        interval = ratio_of_means(*runs, 0.95)
        alarms += interval is not None and interval.excludes(1)
    assert alarms / trials < 0.06


def test_asymmetric_intervals_stay_asymmetric() -> None:
    change = difference(Estimate(mean=1.0, low=0.97, high=1.0), Estimate(mean=0.9, low=0.8, high=0.94))
    assert change.mean == pytest.approx(-0.1)
    assert change.low == pytest.approx(-0.2)
    assert change.high == pytest.approx(-0.05)


@given(st.lists(st.floats(0.1, 9), max_size=40), st.integers(1, 9))
def test_calls_are_divided_among_the_rounds_in_order(calls: list[float], rounds: int) -> None:
    medians = by_round(calls, rounds)
    assert len(medians) == min(rounds, len(calls))
    assert by_round(sorted(calls), rounds) == sorted(by_round(sorted(calls), rounds))
    if medians:
        assert min(calls) <= min(medians) <= max(medians) <= max(calls)
