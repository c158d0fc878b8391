"""Schedules with calls that run no engine: what they are made of, for any budget."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from offcut.runtime.generation.schedule import SKIP
from offcut.runtime.tuning.cuts import cost_of, full_of
from offcut.runtime.tuning.skipping import between, evenly, ladder, mixed, moved, to_the_end, within_budget

CUT = "deepcache:0"


@given(st.integers(2, 60), st.data())
def test_full_calls_are_evenly_spaced(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, calls))
    full = evenly(calls, count)
    assert len(set(full)) == count
    assert full[0] == 0
    gaps = [after - before for before, after in itertools.pairwise((*full, calls))]
    assert max(gaps) - min(gaps) <= 1


@given(st.integers(2, 60), st.data())
def test_the_last_call_of_a_schedule_to_the_end_is_full(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, calls))
    full = to_the_end(calls, count)
    assert len(set(full)) == count
    assert (full[0], full[-1]) == (0, calls - 1)
    gaps = [after - before for before, after in itertools.pairwise(full)]
    assert max(gaps) - min(gaps) <= 1
    assert to_the_end(calls, 1) == (0,)


@given(st.integers(2, 60), st.data())
def test_shallow_calls_go_where_most_are_skipped(calls: int, data: st.DataObject) -> None:
    full = (0, *sorted(data.draw(st.sets(st.integers(1, calls - 1), max_size=calls - 1))))
    shallow = data.draw(st.integers(0, calls))
    cuts = mixed(full, calls, shallow, CUT)
    assert len(cuts) == calls
    assert full_of(cuts) == full
    assert cuts.count(CUT) == min(shallow, calls - len(full))
    runs = [len(list(group)) for cut, group in itertools.groupby(cuts) if cut == SKIP]
    gaps = [cuts[begin + 1 : end] for begin, end in itertools.pairwise((*full, calls))]
    for gap in gaps:  # one that got more had at least as many calls to begin with
        for other in gaps:
            assert gap.count(CUT) <= other.count(CUT) + 1 or len(gap) > len(other)
    assert not runs or max(runs) <= max(len(gap) for gap in gaps)


@given(st.integers(2, 60), st.floats(1.0, 60.0), st.floats(0.01, 1.0))
def test_they_keep_to_the_budget_and_use_it(calls: int, budget: float, ratio: float) -> None:
    made = list(within_budget(calls, budget, ratio, CUT))
    assert made
    assert len({len(full_of(choices[0])) for choices in made}) == len(made)
    for cuts in itertools.chain.from_iterable(made):
        cost = cost_of(cuts, {CUT: ratio})
        assert cost <= budget + 1e-6
        assert cost > budget - max(1.0, ratio) - 1e-6 or SKIP not in cuts


@given(st.integers(2, 60), st.floats(0.01, 1.0))
def test_the_ladder_rises_to_all_calls_full(calls: int, ratio: float) -> None:
    found = ladder(calls, ratio, CUT)
    assert [len(each.full) for each in found] == list(range(2, calls + 1))
    assert set(found[-1].cuts) == {None}
    for each in found:
        assert each.cost == cost_of(each.cuts, {CUT: ratio})
        assert full_of(each.cuts) == each.full


@given(st.integers(3, 60), st.data())
def test_half_way_between_two_ways_of_spacing_are_as_many_full_calls(calls: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(2, calls))
    one, other = evenly(calls, count), to_the_end(calls, count)
    found = between(one, other)
    assert len(set(found)) == count
    assert all(min(pair) <= full <= max(pair) for full, *pair in zip(found, one, other, strict=True))


@given(st.integers(2, 60), st.data())
def test_a_moved_full_call_stays_between_its_neighbours(calls: int, data: st.DataObject) -> None:
    full = (0, *sorted(data.draw(st.sets(st.integers(1, calls - 1), max_size=calls - 1))))
    place, by = data.draw(st.integers(0, len(full) - 1)), data.draw(st.sampled_from((-1, 1)))
    found = moved(full, calls, place, by)
    if found is None:
        assert place == 0 or {full[place] + by} <= {*full, calls}
    else:
        assert found[0] == 0
        assert sorted(set(found)) == list(found)
        assert [one - other for one, other in zip(found, full, strict=True) if one != other] == [by]
        assert found[-1] < calls
