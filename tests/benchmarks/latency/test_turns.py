"""The order in which processes are closed, the end of a warm-up, and the schedules of DeepCache's helper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offcut.benchmarks.latency.case import Case
from offcut.benchmarks.latency.contestants import branch_of, interval_of
from offcut.benchmarks.latency.rounds import make_room, warm_up_calls
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


class _Process:
    """A process stub that records whether it was closed."""

    def __init__(self, resident: int) -> None:
        self.resident, self.open = resident, True

    def close(self) -> None:
        self.open = False


SIZES = st.dictionaries(st.sampled_from("ABCDEF"), st.integers(1, 50), max_size=6)


@given(SIZES, st.integers(0, 200), st.integers(0, 200))
def test_processes_are_closed_last_used_first_until_memory_is_enough(
    resident: dict[str, int], need: int, available: int
) -> None:
    used = {name: _Process(size) for name, size in resident.items()}
    left: Any = dict(used)
    closed = make_room(left, need, lambda: available + sum(p.resident for p in used.values() if not p.open))
    assert [*left, *reversed(closed)] == list(used)
    assert [name for name in used if not used[name].open] == list(reversed(closed))
    freed = [resident[name] for name in closed]
    if closed:  # the last one was still needed
        assert available + sum(freed[:-1]) < need
    if available + sum(freed) < need:
        assert not left


def openings(rounds: int, last_used: bool) -> int:
    """Return how often three processes are opened if two fit; the last used or the least recently used is closed."""
    resident: Any = {}
    opened = 0
    for name in list("ABC") * rounds:
        if name not in resident:
            if last_used:
                make_room(resident, 1, lambda: 2 - len(resident))
            elif len(resident) == 2:
                del resident[next(iter(resident))]
            opened += 1
        resident[name] = resident.pop(name, _Process(1))
    return opened


def test_closing_the_last_used_process_causes_the_fewest_openings() -> None:
    assert openings(10, last_used=False) == 30
    assert openings(10, last_used=True) < 20


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
def test_deepcaches_helper_supports_only_intervals_without_warm_up(schedule: str) -> None:
    assert interval_of("uniform:4") == 4
    with pytest.raises(UserError, match="supports only uniform intervals without warm-up"):
        interval_of(schedule)


def test_a_branch_is_a_deepcache_cut() -> None:
    assert branch_of("deepcache:2") == 2
    with pytest.raises(UserError, match="no branch for the cut mlperf"):
        branch_of("mlperf")
