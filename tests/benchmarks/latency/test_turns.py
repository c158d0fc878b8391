"""Who is next, who is closed when memory is short, and what one house answers: the parts without a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offcut.benchmarks.latency.case import Case, Entrant
from offcut.benchmarks.latency.contestants import branch_of, interval_of
from offcut.benchmarks.latency.rounds import to_close, turns, warm_up_calls
from offcut.errors import UserError
from offcut.runtime.generation.schedule import Uniform

CASE = Case(
    bundle="b",
    model=None,
    folder="f",
    optimum="o",
    steps=6,
    guidance=7.5,
    scheduler="DDIMScheduler",
    height=64,
    width=64,
    images=1,
    schedule="uniform:3",
    cut="deepcache:0",
    threads=1,
)


def entrants(count: int) -> list[Entrant]:
    return [Entrant(str(index), "f", "e", "fp32", "eager", False, f"house {index}") for index in range(count)]


@given(st.integers(1, 8))
def test_everybody_has_one_turn_a_round_and_knows_who_follows(count: int) -> None:
    everybody = entrants(count)
    forever = everybody * 3
    rounds = list(turns(everybody))
    assert [coming[0] for coming in rounds] == everybody
    for turn, coming in enumerate(rounds):
        assert coming == forever[turn : 2 * count]  # to the end of the next round: all others are in it


SIZES = st.dictionaries(st.sampled_from("ABCDEF"), st.integers(1, 50), max_size=6)


@given(SIZES, st.permutations("ABCDEF"), st.integers(0, 200), st.integers(0, 200))
def test_only_as_many_are_closed_as_must_be_the_furthest_first(
    resident: dict[str, int], order: list[str], need: int, available: int
) -> None:
    closed = to_close(resident, [*order, *order], need, available)
    assert len(set(closed)) == len(closed)
    assert set(closed) <= set(resident)
    freed = [resident[house] for house in closed]
    if closed:  # the last one was still needed
        assert available + sum(freed[:-1]) < need
    if available + sum(freed) < need:
        assert set(closed) == set(resident)
    kept = set(resident) - set(closed)
    assert all(order.index(gone) > order.index(stays) for gone in closed for stays in kept)


def openings(rounds: int, furthest: bool) -> int:
    """How often one of three houses is opened where two have room; else the one unused longest is closed."""
    resident: dict[str, int] = {}
    opened = 0
    order = list("ABC") * (rounds + 1)
    for turn in range(3 * rounds):
        house = order[turn]
        if house not in resident:
            gone = to_close(resident, order[turn + 1 :], 1, 2 - len(resident)) if furthest else []
            if not furthest and len(resident) == 2:
                gone = [next(iter(resident))]  # kept in the order of use
            for other in gone:
                del resident[other]
            opened += 1
        resident[house] = resident.pop(house, 1)
    return opened


def test_closing_the_furthest_reopens_less_than_closing_the_one_unused_longest() -> None:
    assert openings(10, furthest=False) == 30
    assert openings(10, furthest=True) < 20


@given(st.integers(2, 30), st.integers(2, 30))
def test_the_warm_up_ends_with_the_first_shallow_call(steps: int, interval: int) -> None:
    case = replace(CASE, steps=steps, schedule=str(Uniform(interval)))
    calls = warm_up_calls(case)
    full = Uniform(interval).full_calls(steps)
    assert calls - 1 not in full
    assert set(range(calls - 1)) <= set(full)


def test_a_schedule_without_a_shallow_call_is_refused() -> None:
    with pytest.raises(UserError, match="give more --steps"):
        warm_up_calls(replace(CASE, steps=2, schedule="uniform:3:warmup=2"))


@pytest.mark.parametrize("schedule", ["quad:3", "steps:0,2", "uniform:3:warmup=1", "uniform:3:max_shallow=1"])
def test_deepcaches_helper_follows_plain_intervals_only(schedule: str) -> None:
    assert interval_of("uniform:4") == 4
    with pytest.raises(UserError, match="uniform intervals without warm-up only"):
        interval_of(schedule)


def test_a_branch_is_a_deepcache_cut() -> None:
    assert branch_of("deepcache:2") == 2
    with pytest.raises(UserError, match="no branch for the cut mlperf"):
        branch_of("mlperf")
