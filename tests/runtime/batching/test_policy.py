"""The policy: properties that hold for any set of waiting calls, and the order of deadlines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.errors import UserError
from offcut.runtime.batching.policy import Pick, Policy, WaitingCall

CUTS = [None, "deepcache:0", "deepcache:1"]

Calls = tuple[WaitingCall, ...]
Limits = dict[int, int]

waiting_call = st.builds(
    WaitingCall,
    key=st.just(0),
    lane=st.integers(0, 2),
    cut=st.sampled_from(CUTS),
    rows=st.integers(1, 4),
    due=st.sampled_from([1.0, 2.0, 3.0, 50.0]),
    passed_over=st.integers(0, 20),
)
waiting_calls = st.lists(waiting_call, min_size=1, max_size=12).map(
    lambda calls: tuple(replace(call, key=key) for key, call in enumerate(calls))
)
row_limits = st.lists(st.integers(1, 12), min_size=3, max_size=3).map(lambda limits: dict(enumerate(limits)))
policies = st.builds(Policy, st.integers(1, 12))


def members(waiting: Sequence[WaitingCall], pick: Pick) -> list[WaitingCall]:
    return [call for call in waiting if call.key in pick.members]


@given(policies, waiting_calls, row_limits)
@settings(max_examples=300, deadline=None)
def test_a_call_has_one_lane_and_one_kind_and_stays_within_the_limit(
    policy: Policy, waiting: Calls, limits: Limits
) -> None:
    pick = policy.choose(waiting, limits)
    chosen = members(waiting, pick)
    assert len(chosen) == len(pick.members) == len(set(pick.members)) >= 1
    assert {(call.lane, call.cut) for call in chosen} == {(pick.lane, pick.cut)}
    assert sum(call.rows for call in chosen) <= limits[pick.lane] or len(chosen) == 1


@given(policies, waiting_calls, row_limits, st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_pick_does_not_depend_on_the_order_of_the_calls(
    policy: Policy, waiting: Calls, limits: Limits, random: Random
) -> None:
    shuffled = list(waiting)
    random.shuffle(shuffled)
    assert policy.choose(waiting, limits) == policy.choose(waiting, limits) == policy.choose(shuffled, limits)


@given(policies, waiting_calls, row_limits)
@settings(max_examples=200, deadline=None)
def test_calls_that_fit_are_not_left_out(policy: Policy, waiting: Calls, limits: Limits) -> None:
    pick = policy.choose(waiting, limits)
    rows = sum(call.rows for call in members(waiting, pick))
    for call in waiting:
        if (call.lane, call.cut) == (pick.lane, pick.cut) and call.key not in pick.members:
            assert rows + call.rows > limits[pick.lane]


@given(policies, waiting_calls, row_limits)
@settings(max_examples=200, deadline=None)
def test_the_longest_waiting_call_beyond_the_bound_goes_next(policy: Policy, waiting: Calls, limits: Limits) -> None:
    starved = [call for call in waiting if call.passed_over >= policy.bound]
    if starved:
        longest = max(call.passed_over for call in starved)
        chosen = members(waiting, policy.choose(waiting, limits))
        assert any(call.passed_over == longest for call in chosen)


@given(
    policies,
    waiting_calls,
    row_limits,
    st.lists(st.tuples(st.sampled_from(CUTS), st.sampled_from([0.5, 1.0, 9.0])), min_size=8),
)
@settings(max_examples=100, deadline=None)
def test_no_request_starves(
    policy: Policy, waiting: Calls, limits: Limits, following: list[tuple[str | None, float]]
) -> None:
    """Each served request makes its next call at once. No call is passed over more than ``bound + n - 1`` times."""
    calls = {call.key: replace(call, passed_over=0) for call in waiting}
    allowed = policy.bound + len(calls) - 1
    served: Counter[int] = Counter()
    for tick in range(3 * allowed + 3):
        pick = policy.choose(tuple(calls.values()), limits)
        for key, call in calls.items():
            if key in pick.members:
                cut, due = following[(tick + key) % len(following)]
                calls[key] = replace(call, cut=cut, due=due, passed_over=0)
                served[key] += 1
            else:
                calls[key] = replace(call, passed_over=call.passed_over + 1)
                assert calls[key].passed_over <= allowed
    assert set(served) == set(calls)


@given(waiting_calls, row_limits)
@settings(max_examples=200, deadline=None)
def test_requests_are_served_in_the_order_of_their_deadlines(waiting: Calls, limits: Limits) -> None:
    waiting = tuple(replace(call, passed_over=0) for call in waiting)
    pick = Policy().choose(waiting, limits)
    chosen = members(waiting, pick)
    first = min(waiting, key=lambda call: (call.due, call.key))
    assert first.key in pick.members
    for call in waiting:
        left_out = (call.lane, call.cut) == (pick.lane, pick.cut) and call.key not in pick.members
        earlier = [other for other in chosen if (other.due, other.key) < (call.due, call.key)]
        if left_out:  # calls that are due earlier took its rows
            assert sum(other.rows for other in earlier) + call.rows > limits[pick.lane]


def test_members_are_in_the_order_of_their_keys() -> None:
    """While the members stay the same, their features stay in place."""
    calls = [WaitingCall(key, 0, "deepcache:0", 1, due=due) for key, due in ((0, 3.0), (1, 1.0), (2, 2.0))]
    assert Policy().choose(calls, {0: 8}).members == (0, 1, 2)


def test_the_first_due_call_goes_before_a_larger_group() -> None:
    full = [WaitingCall(key, 0, None, 1, due=1.0) for key in range(2)]
    shallow = [WaitingCall(key, 0, "deepcache:0", 1, due=5.0) for key in range(2, 5)]
    assert Policy().choose([*full, *shallow], {0: 8}).members == (0, 1)


def test_a_bound_below_1_is_refused() -> None:
    with pytest.raises(UserError, match="at least 1, not 0"):
        Policy(0)
