"""What a policy promises, whatever waits; and the rules of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.errors import UserError
from offcut.runtime.batching.policy import POLICIES, Aligned, Deadline, Largest, Pick, Policy, View, Waiting, policy_of
from offcut.runtime.batching.times import StepTimes

CUTS = [None, "deepcache:0", "deepcache:1"]
TIMES = StepTimes({cut: {1: seconds, 8: 4 * seconds} for cut, seconds in zip(CUTS, (1.0, 0.2, 0.3), strict=True)})

waiting = st.builds(
    Waiting,
    key=st.just(0),
    lane=st.integers(0, 2),
    cut=st.sampled_from(CUTS),
    rows=st.integers(1, 4),
    due=st.sampled_from([1.0, 2.0, 3.0, 50.0]),
    passed=st.integers(0, 20),
    until_full=st.none() | st.integers(1, 5),
)
views = st.builds(
    lambda calls, limits, times: View(
        tuple(replace(call, key=key) for key, call in enumerate(calls)),
        dict(enumerate(limits)),
        dict.fromkeys(range(3), TIMES) if times else {},
    ),
    st.lists(waiting, min_size=1, max_size=12),
    st.lists(st.integers(1, 12), min_size=3, max_size=3),
    st.booleans(),
)
policies = st.builds(policy_of, st.sampled_from(sorted(POLICIES)), st.integers(1, 12))


def members(view: View, pick: Pick) -> list[Waiting]:
    return [call for call in view.waiting if call.key in pick.members]


@given(policies, views)
@settings(max_examples=300, deadline=None)
def test_a_call_is_of_one_lane_and_kind_and_no_larger_than_the_engines_take(policy: Policy, view: View) -> None:
    pick = policy.choose(view)
    chosen = members(view, pick)
    assert len(chosen) == len(pick.members) == len(set(pick.members)) >= 1
    assert {(call.lane, call.cut) for call in chosen} == {(pick.lane, pick.cut)}
    assert sum(call.rows for call in chosen) <= view.limits[pick.lane] or len(chosen) == 1


@given(policies, views, st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_same_view_gives_the_same_pick_in_whatever_order_it_is_told(
    policy: Policy, view: View, random: object
) -> None:
    shuffled = list(view.waiting)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    assert policy.choose(view) == policy.choose(view) == policy.choose(replace(view, waiting=tuple(shuffled)))


@given(policies, views)
@settings(max_examples=200, deadline=None)
def test_nobody_who_fits_is_left_behind(policy: Policy, view: View) -> None:
    pick = policy.choose(view)
    rows = sum(call.rows for call in members(view, pick))
    for call in view.waiting:
        if (call.lane, call.cut) == (pick.lane, pick.cut) and call.key not in pick.members:
            assert rows + call.rows > view.limits[pick.lane]


@given(policies, views)
@settings(max_examples=200, deadline=None)
def test_who_has_waited_longest_beyond_the_bound_goes_next(policy: Policy, view: View) -> None:
    late = [call for call in view.waiting if call.passed >= policy.bound]
    if late:
        longest = max(call.passed for call in late)
        assert any(call.passed == longest for call in members(view, policy.choose(view)))


@given(policies, views, st.lists(st.tuples(st.sampled_from(CUTS), st.sampled_from([0.5, 1.0, 9.0])), min_size=8))
@settings(max_examples=100, deadline=None)
def test_nobody_starves(policy: Policy, view: View, following: list[tuple[str | None, float]]) -> None:
    """Whoever was served comes back at once, at some step and with some deadline; the bound of the module holds."""
    calls = {call.key: replace(call, passed=0) for call in view.waiting}
    allowed = policy.bound + len(calls) - 1
    served: Counter[int] = Counter()
    for tick in range(3 * allowed + 3):
        pick = policy.choose(replace(view, waiting=tuple(calls.values())))
        for key, call in calls.items():
            if key in pick.members:
                cut, due = following[(tick + key) % len(following)]
                calls[key] = replace(call, cut=cut, due=due, passed=0)
                served[key] += 1
            else:
                calls[key] = replace(call, passed=call.passed + 1)
                assert calls[key].passed <= allowed
    assert set(served) == set(calls)


@given(views)
@settings(max_examples=200, deadline=None)
def test_deadlines_are_served_in_their_order(view: View) -> None:
    view = replace(view, waiting=tuple(replace(call, passed=0) for call in view.waiting))
    pick = Deadline().choose(view)
    chosen = members(view, pick)
    first = min(view.waiting, key=lambda call: (call.due, call.key))
    assert first.key in pick.members
    for call in view.waiting:
        left = (call.lane, call.cut) == (pick.lane, pick.cut) and call.key not in pick.members
        earlier = [other for other in chosen if (other.due, other.key) < (call.due, call.key)]
        if left:  # only those who are due earlier can have taken its place
            assert sum(other.rows for other in earlier) + call.rows > view.limits[pick.lane]


def view_of(*calls: Waiting, limit: int = 8) -> View:
    return View(calls, {0: limit}, {0: TIMES})


def test_the_largest_group_goes_first() -> None:
    full = [Waiting(key, 0, None, 1, due=1.0) for key in range(2)]
    shallow = [Waiting(key, 0, "deepcache:0", 1, due=5.0) for key in range(2, 5)]
    assert Largest().choose(view_of(*full, *shallow)).members == (2, 3, 4)
    assert Largest().choose(view_of(*full, *shallow[:2])).members == (0, 1)
    assert Deadline().choose(view_of(*full, *shallow)).members == (0, 1)


def test_full_steps_are_held_only_if_that_saves_time() -> None:
    held = Waiting(0, 0, None, 1, due=1.0)
    soon = [Waiting(key, 0, "deepcache:0", 1, due=2.0, until_full=1) for key in (1, 2)]
    late = [replace(call, until_full=7) for call in soon]
    assert Aligned().choose(view_of(held, *soon)).members == (1, 2)
    assert Aligned().choose(view_of(held, *late)).members == (0,)
    assert Aligned().choose(view_of(held, *soon, limit=2)).members == (0,)  # they would not fit into one call
    assert Aligned().choose(replace(view_of(held, *soon), times={})).members == (0,)  # nothing is known
    assert Aligned(bound=3).choose(view_of(replace(held, passed=3), *soon)).members == (0,)


def test_features_stay_in_place_while_the_members_stay() -> None:
    calls = [Waiting(key, 0, "deepcache:0", 1, due=due) for key, due in ((0, 3.0), (1, 1.0), (2, 2.0))]
    assert Deadline().choose(view_of(*calls)).members == (0, 1, 2)


def test_mistakes_are_told() -> None:
    with pytest.raises(UserError, match="no policy 'fair': choose deadline, largest, aligned"):
        policy_of("fair")
    with pytest.raises(UserError, match="at least 1, not 0"):
        Deadline(0)


def test_times_between_and_beyond_the_measured_ones() -> None:
    times = StepTimes({None: {2: 1.0, 4: 2.0, 8: 3.0}, "deepcache:0": {2: 0.5}, "mlperf": {1: 2.0, 4: 0.5}})
    assert [times.seconds(None, rows) for rows in (2, 3, 6, 8, 12)] == [1.0, 1.5, 2.5, 3.0, 4.0]
    assert times.seconds(None, 1) == 0.5
    assert times.seconds("deepcache:0", 4) == 1.0
    assert times.seconds("mlperf", 8) == 0.5  # never below what was measured
    assert times.knows("mlperf")
    assert not times.knows("deepcache:1")


@given(st.dictionaries(st.integers(1, 32), st.floats(0.01, 5), min_size=1), st.integers(1, 64))
def test_no_call_is_free(table: dict[int, float], rows: int) -> None:
    assert StepTimes({None: table}).seconds(None, rows) > 0
