"""Histograms in constant memory, and the ranges that they give."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from offcut.exporter.quantize.histogram import BINS, METHODS, Histogram, Range

values = arrays(np.float32, st.integers(1, 200), elements=st.floats(-1e4, 1e4, width=32))


def seen(*calls: npt.NDArray[np.float32]) -> Histogram:
    histogram = Histogram()
    for call in calls:
        histogram.add(call, float(call.min()), float(call.max()))
    return histogram


@given(st.lists(values, min_size=1, max_size=4))
def test_order_and_division_into_calls_make_no_difference(calls: list[npt.NDArray[np.float32]]) -> None:
    together, reversed_ = seen(np.concatenate(calls)), seen(*reversed(calls))
    assert np.array_equal(together._counts, reversed_._counts)
    assert together._counts.sum() == sum(call.size for call in calls)
    assert (together.low, together.high) == (reversed_.low, reversed_.high)


@given(values, st.sampled_from(METHODS))
def test_a_range_contains_zero_and_lies_within_the_values(call: npt.NDArray[np.float32], method: str) -> None:
    histogram = seen(call)
    found = histogram.range(method)
    assert min(0.0, float(call.min())) <= found.low <= 0 <= found.high <= max(0.0, float(call.max()))


def test_minmax_is_exact() -> None:
    assert seen(np.array([-3.25, 0.5, 7.125], np.float32)).range("minmax") == Range(-3.25, 7.125)
    assert seen(np.array([2.0, 3.0], np.float32)).range("minmax") == Range(0.0, 3.0)


def test_the_expected_error_is_that_of_rounding() -> None:
    data = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    within = Range(-2.0, 2.5)
    step = 4.5 / 255
    rounded = np.clip(np.rint((data + 2.0) / step), 0, 255) * step - 2.0
    assert seen(data).error(within) == pytest.approx(float(np.mean((data - rounded) ** 2)), rel=0.05)


def test_outliers_are_clipped_by_the_methods_that_clip() -> None:
    data = np.random.default_rng(0).normal(size=200_000).astype(np.float32)
    data[0] = 60.0
    histogram = seen(data)
    assert histogram.range("minmax").high == 60.0
    assert histogram.range("percentile").high < 6
    least = histogram.range("mse")
    assert least.high < 60
    assert histogram.error(least) < histogram.error(histogram.range("minmax"))


def test_values_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        Histogram().add(np.zeros(1, np.float32), 0.0, float("inf"))


def test_memory_does_not_grow() -> None:
    histogram = seen(*(np.full(1000, 10.0**k, np.float32) for k in range(-3, 6)))
    assert histogram._counts.size == BINS
