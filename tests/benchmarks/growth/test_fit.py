"""The exponents: those that made the points, and honest about how well they are known."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offcut.benchmarks.growth.sweeps import power_law

values = st.lists(st.integers(1, 10**6), min_size=2, max_size=8, unique=True)


@given(values, st.floats(-3, 3), st.floats(1e-3, 1e3))
def test_a_power_law_is_found_again(x: list[int], exponent: float, factor: float) -> None:
    law = power_law("loop", x, [factor * value**exponent for value in x])
    assert law is not None
    assert law.exponent == pytest.approx(exponent, abs=1e-6)
    assert law.points == len(x)
    assert law.error is None if len(x) == 2 else law.error == pytest.approx(0, abs=1e-5)


def test_one_setting_has_no_exponent() -> None:
    assert power_law("loop", [4, 4], [1.0, 2.0]) is None
    assert power_law("loop", [], []) is None


def test_noise_shows_in_the_error() -> None:
    law = power_law("loop", [1, 2, 4], [1.0, 2.2, 3.9])
    assert law is not None
    assert law.error is not None
    assert 0.01 < law.error < 0.1
    assert abs(law.exponent - 1) < 2 * law.error
