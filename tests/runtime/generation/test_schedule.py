"""Schedules against a brute-force oracle that marks full calls one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.errors import ScheduleError
from offcut.runtime.generation.schedule import Quad, Schedule, Steps, Uniform, parse

CASES = settings(max_examples=1000, deadline=None)

modifiers = st.fixed_dictionaries(
    {},
    optional={
        "warmup": st.integers(0, 12),
        "cooldown": st.integers(0, 12),
        "max_shallow": st.integers(1, 12) | st.none(),
    },
)
uniform = st.builds(lambda interval, kw: Uniform(interval, **kw), st.integers(1, 30), modifiers)
quad = st.builds(
    lambda interval, center, power, kw: Quad(interval, center, power, **kw),
    st.integers(1, 30),
    st.integers(0, 60) | st.none(),
    st.floats(1.01, 4) | st.sampled_from([None, 1.2, 1.4, 1.5]),
    modifiers,
)
steps = st.builds(lambda calls, kw: Steps(calls, **kw), st.lists(st.integers(0, 120), max_size=20), modifiers)
schedules = st.one_of(uniform, quad, steps)
calls = st.integers(1, 100)


def oracle(schedule: Schedule, n: int) -> list[int]:
    """Return the full calls, found by marks in a list."""
    full = [False] * n
    full[0] = True
    if isinstance(schedule, Uniform):
        position = schedule.warmup - 1 if schedule.warmup else 0
        while position < n:
            full[position] = True
            position += schedule.interval
    elif isinstance(schedule, Quad):
        for position in oracle_quad(n, schedule):
            full[position] = True
    else:
        assert isinstance(schedule, Steps)
        for position in range(n):
            if position in list(schedule.calls):
                full[position] = True
    for position in range(n):
        if position < schedule.warmup or n - position <= schedule.cooldown:
            full[position] = True
    if schedule.max_shallow is not None:
        shallow_in_a_row = 0
        for position in range(n):
            shallow_in_a_row = 0 if full[position] else shallow_in_a_row + 1
            if shallow_in_a_row > schedule.max_shallow:
                full[position] = True
                shallow_in_a_row = 0
    return [position for position in range(n) if full[position]]


def oracle_quad(n: int, schedule: Quad) -> list[int]:
    """Return the full calls of the paper's method, in NumPy's extended precision and with powers in polar form."""
    count = int(np.ceil(n / schedule.interval))
    center = np.longdouble(schedule.center or 0)
    power = schedule.power or (1.4 if schedule.center is not None else 1.5)

    def raised(real: np.ndarray, imaginary: np.ndarray, exponent: float) -> tuple[np.ndarray, np.ndarray]:
        radius = np.hypot(real, imaginary) ** np.longdouble(exponent)
        angle = np.arctan2(imaginary, real) * np.longdouble(exponent)
        return radius * np.cos(angle), radius * np.sin(angle)

    zero = np.longdouble(0)
    for lowered in (power - 0.02 * step for step in range(1000)):
        if lowered < 1.000001:
            return [position * n // count for position in range(count)]
        first = raised(-center, zero, 1 / lowered)
        last = raised(n - center, zero, 1 / lowered)
        share = np.arange(count, dtype=np.longdouble) / count
        line = [begin + (end - begin) * share for begin, end in zip(first, last, strict=True)]
        values, _ = raised(line[0], line[1], lowered)
        near = np.abs(values - np.rint(values)) < 1e-9
        found = (np.where(near, np.rint(values), np.trunc(values)) + center).astype(int).tolist()
        found[0] = 0
        if found == sorted(set(found)) and len(found) == count and found[-1] < n:
            return list(found)
    raise AssertionError("the power did not fall to 1")


@CASES
@given(schedules, calls)
def test_full_calls_equal_the_oracles(schedule: Schedule, n: int) -> None:
    if isinstance(schedule, Quad) and schedule.center is not None and schedule.center >= n:
        with pytest.raises(ScheduleError, match="smaller center"):
            schedule.full_calls(n)
        return
    assert list(schedule.full_calls(n)) == oracle(schedule, n)


@CASES
@given(schedules, calls)
def test_properties_of_every_schedule(schedule: Schedule, n: int) -> None:
    if isinstance(schedule, Quad) and (schedule.center or 0) >= n:
        return
    full = schedule.full_calls(n)
    assert full[0] == 0
    assert list(full) == sorted(set(full))
    assert full[-1] < n
    assert [schedule.is_full(call, n) for call in range(n)] == [call in full for call in range(n)]
    assert schedule.is_full(n, n)
    assert schedule.is_full(n + 3, n)
    if schedule.max_shallow is not None:
        gaps = np.diff([*full, n])
        assert gaps.max() <= schedule.max_shallow + 1
    if not schedule.needs_calls:
        assert [schedule.is_full(call) for call in range(n)] == [call in full for call in range(n)]


@CASES
@given(schedules)
def test_text_forms_can_be_read_back(schedule: Schedule) -> None:
    assert parse(str(schedule)) == schedule
    assert eval(repr(schedule)) == schedule


def test_the_papers_check_value() -> None:
    assert Quad(5).full_calls(50) == (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    assert Quad(5, center=15, power=1.4) == Quad(5, 15, 1.4)


def test_uniform_is_deepcaches_without_warmup_and_moves_with_it() -> None:
    assert Uniform(5).full_calls(20) == (0, 5, 10, 15)
    assert Uniform(5, warmup=1).full_calls(20) == (0, 5, 10, 15)
    assert Uniform(5, warmup=3).full_calls(20) == (0, 1, 2, 7, 12, 17)
    assert Uniform(5, warmup=2, cooldown=3).full_calls(20) == (0, 1, 6, 11, 16, 17, 18, 19)
    assert Uniform(8, max_shallow=2).full_calls(20) == (0, 3, 6, 8, 11, 14, 16, 19)


def test_quad_makes_as_many_full_calls_as_uniform() -> None:
    for n in range(16, 101):
        assert len(Quad(5).full_calls(n)) == len(Uniform(5).full_calls(n))


def test_which_schedules_need_the_number_of_calls() -> None:
    assert not Uniform(5).needs_calls
    assert not Uniform(5, warmup=2, max_shallow=2).needs_calls
    assert not Steps([3]).needs_calls
    assert Uniform(5, cooldown=1).needs_calls
    assert Steps([3], cooldown=1).needs_calls
    assert Quad(5).needs_calls
    with pytest.raises(ScheduleError, match=r"offcut\.load or offcut\.attach.*unet\.generation\(calls=n\)"):
        Quad(5).is_full(0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(0), "interval is 0, but must be at least 1"),
        (lambda: Uniform(2.5), r"interval is 2\.5, but must be an integer"),  # type: ignore[arg-type]
        (lambda: Uniform(True), "interval is True"),
        (lambda: Uniform(2, warmup=-1), "warmup is -1"),
        (lambda: Uniform(2, cooldown=-1), "cooldown is -1"),
        (lambda: Uniform(2, max_shallow=0), "max_shallow is 0, but must be at least 1"),
        (lambda: Quad(5, power=1.0), "power is 1.0"),
        (lambda: Quad(5, center=-1), "center is -1"),
        (lambda: Steps([-1]), "a full call is -1"),
        (lambda: Uniform(2).full_calls(-1), "the number of calls is -1"),
        (lambda: parse("uniform"), "not a schedule: write uniform:5"),
        (lambda: parse("linear:5"), "not a schedule"),
        (lambda: parse("uniform:five"), "'five'.*not a number"),
        (lambda: parse("uniform:5:width=2"), "'width=2'.*it takes .*warmup"),
        (lambda: parse("uniform:warmup=2"), "lacks its interval"),
    ],
)
def test_errors_name_the_cause(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ScheduleError, match=message):
        make()


def test_parse() -> None:
    assert parse("uniform:5") == Uniform(5)
    assert parse(" Uniform:interval=5:max-shallow=2") == Uniform(5, max_shallow=2)
    assert parse("quad:5:center=none:power=1.3") == Quad(5, None, 1.3)
    assert parse("steps:0,3,9", warmup=2, cooldown=None) == Steps([3, 9], warmup=2)
    assert parse("uniform:5:warmup=1", warmup=3) == Uniform(5, warmup=3)


def test_schedules_compare_by_value() -> None:
    assert Steps((9, 3)) == Steps([0, 3, 9])
    assert len({Uniform(5), Uniform(5, warmup=0), Uniform(np.int64(5))}) == 1
    assert repr(Quad(5, 12, warmup=2)) == "Quad(5, center=12, warmup=2)"
    assert str(Steps([3, 9])) == "steps:0,3,9"
