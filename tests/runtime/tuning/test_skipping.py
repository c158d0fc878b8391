"""Schedules with skipped calls: spacing of full calls, number of shallow calls, and budgets."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from offcut.runtime.generation.schedule import SKIP
from offcut.runtime.tuning.search import cost_in_full_calls, full_calls
from offcut.runtime.tuning.skipping import (
    evenly_spaced,
    midpoints,
    skipping_schedules,
    spaced_to_last_call,
    spread_shallow_calls,
    with_call_moved,
    within_budget,
)

CUT = "deepcache:0"


@given(st.integers(2, 60), st.data())
def test_full_calls_are_evenly_spaced(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, calls))
    full = evenly_spaced(calls, count)
    assert len(set(full)) == count
    assert full[0] == 0
    gaps = [after - before for before, after in itertools.pairwise((*full, calls))]
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(2, 60), st.data())
def test_the_last_call_of_a_schedule_to_the_end_is_full(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, calls))
    full = spaced_to_last_call(calls, count)
    assert len(set(full)) == count
    assert (full[0], full[-1]) == (0, calls - 1)
    gaps = [after - before for before, after in itertools.pairwise(full)]
    assert max(gaps) - min(gaps) <= 1
    assert spaced_to_last_call(calls, 1) == (0,)


@given(st.integers(2, 60), st.data())
def test_shallow_calls_go_into_the_widest_gaps(calls: int, data: st.DataObject) -> None:
    full = (0, *sorted(data.draw(st.sets(st.integers(1, calls - 1), max_size=calls - 1))))
    shallow = data.draw(st.integers(0, calls))
    cuts = spread_shallow_calls(full, calls, shallow, CUT)
    assert len(cuts) == calls
    assert full_calls(cuts) == full
    assert cuts.count(CUT) == min(shallow, calls - len(full))
    runs = [len(list(group)) for cut, group in itertools.groupby(cuts) if cut == SKIP]
    gaps = [cuts[begin + 1 : end] for begin, end in itertools.pairwise((*full, calls))]
    for gap in gaps:  # a gap with more shallow calls has at least as many calls
        for other in gaps:
            assert gap.count(CUT) <= other.count(CUT) + 1 or len(gap) > len(other)
    assert not runs or max(runs) <= max(len(gap) for gap in gaps)


@given(st.integers(2, 60), st.floats(1.0, 60.0), st.floats(0.01, 1.0))
def test_schedules_stay_within_the_budget_and_use_it(calls: int, budget: float, ratio: float) -> None:
    options = list(within_budget(calls, budget, ratio, CUT))
    assert options
    assert len({len(full_calls(schedules[0])) for schedules in options}) == len(options)
    for cuts in itertools.chain.from_iterable(options):
        cost = cost_in_full_calls(cuts, {CUT: ratio})
        assert cost <= budget + 1e-6
        assert cost > budget - max(1.0, ratio) - 1e-6 or SKIP not in cuts


@given(st.integers(2, 60), st.floats(0.01, 1.0))
def test_skipping_schedules_end_with_only_full_calls(calls: int, ratio: float) -> None:
    schedules = skipping_schedules(calls, ratio, CUT)
    assert [len(schedule.full) for schedule in schedules] == list(range(2, calls + 1))
    assert set(schedules[-1].cuts) == {None}
    for schedule in schedules:
        assert schedule.cost == cost_in_full_calls(schedule.cuts, {CUT: ratio})
        assert full_calls(schedule.cuts) == schedule.full


@given(st.integers(3, 60), st.data())
def test_midpoints_lie_between_two_spacings_with_the_same_count(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, calls))
    one, other = evenly_spaced(calls, count), spaced_to_last_call(calls, count)
    between = midpoints(one, other)
    assert len(set(between)) == count
    assert all(min(pair) <= full <= max(pair) for full, *pair in zip(between, one, other, strict=True))


@given(st.integers(2, 60), st.data())
def test_a_moved_full_call_stays_between_its_neighbours(calls: int, data: st.DataObject) -> None:
    full = (0, *sorted(data.draw(st.sets(st.integers(1, calls - 1), max_size=calls - 1))))
    place, by = data.draw(st.integers(0, len(full) - 1)), data.draw(st.sampled_from((-1, 1)))
    result = with_call_moved(full, calls, place, by)
    if result is None:
        assert place == 0 or {full[place] + by} <= {*full, calls}
    else:
        assert result[0] == 0
        assert sorted(set(result)) == list(result)
        assert [one - other for one, other in zip(result, full, strict=True) if one != other] == [by]
        assert result[-1] < calls
