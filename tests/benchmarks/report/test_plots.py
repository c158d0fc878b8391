"""Plots agree with the figures: fronts with brute force, bars with their parts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import contestant, latency, quality

from offcut.benchmarks.report.findings import base_of, front, reference, speed, uncached_twin
from offcut.benchmarks.report.formatting import digits, size
from offcut.benchmarks.report.plots import COLOURS, Bar, ScatterPoint, bars, scatter, to_svg
from offcut.benchmarks.stats import Estimate

POINTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: (float(p[0]), float(p[1]))), max_size=12
)


@given(POINTS)
def test_no_point_dominates_a_point_on_the_front(points: list[tuple[float, float]]) -> None:
    on_front = front(points)
    for index, point in enumerate(points):
        beaten = [o for o in points if o != point and o[0] >= point[0] and o[1] >= point[1]]
        assert (point in [points[place] for place in on_front]) is (not beaten), index
    assert [points[place][0] for place in on_front] == sorted({points[place][0] for place in on_front}, reverse=True)


def test_a_bars_parts_add_up_and_the_ideal_is_at_the_end_of_the_calls() -> None:
    bar = Bar("x", total=8, least=7, most=9, full=5, shallow=2)
    assert bar.pieces == [("full", 0, 5), ("shallow", 5, 7), ("rest", 7, 8)]
    assert bar.ideal == 7
    assert Bar("x", 8, 7, 9).pieces == [("whole", 0, 8)]
    assert Bar("x", 8, 7, 9).ideal is None


def test_a_bar_ends_with_the_loop_even_if_its_calls_take_longer() -> None:
    assert Bar("x", total=8, least=7, most=9, full=7, shallow=2).pieces == [("full", 0, 7), ("shallow", 7, 8)]


def test_bars_are_drawn_to_scale() -> None:
    axes = bars([Bar("x", 8, 7, 9, 5, 2), Bar("y", 4, 4, 4)]).axes[0]
    assert [(box.get_x(), box.get_width()) for box in axes.patches] == [(0, 5), (5, 2), (7, 1), (0, 4)]
    lines = [line.get_xdata() for line in axes.lines if len(line.get_xdata())]
    assert [list(line) for line in lines] == [[7, 9], [7, 7], [4, 4]]


def test_a_scatter_fills_the_front_only() -> None:
    points = [
        ScatterPoint("a", 1.5, Estimate(mean=40, low=39, high=41), "cached"),
        ScatterPoint("b", 2.5, Estimate(mean=30, low=29, high=31), "cached"),
        ScatterPoint("c", 1.4, Estimate(mean=20, low=19, high=21), "fewer steps"),
    ]

    def filled(**options: bool) -> set[float]:
        lines = scatter(points, "dB", **options).axes[0].lines
        marks = [line for line in lines if len(line.get_xdata()) == 1 and line.get_marker() in ("o", "D")]
        return {line.get_xdata()[0] for line in marks if line.get_markerfacecolor() != COLOURS["paper"]}

    assert filled() == {1.5, 2.5}
    assert filled(more_is_better=False) == {2.5, 1.4}
    labels = [text.get_text() for text in scatter(points, "dB").axes[0].texts]
    assert sorted(labels) == ["a", "b", "c"]
    scatter(points[:1], "dB")


def test_an_svg_has_no_colour_of_its_own_and_escapes_its_title() -> None:
    svg = to_svg(scatter([ScatterPoint("<b>", 1.5, Estimate(mean=4, low=3, high=5), "cached")], "$y$"), '"<i>')
    assert "var(--full)" in svg
    assert "#0000" not in svg
    assert "&lt;b&gt;" in svg
    assert "<b>" not in svg
    assert "<i>" not in svg
    assert "$y$" in svg


def test_rows_are_compared_with_the_base_and_the_best_peers() -> None:
    rows = latency().contestants
    base = base_of(rows)
    assert base is not None
    assert base.name == "diffusers eager fp32"
    assert base_of([contestant("offcut openvino fp32", 1.0, 0.1)]) is None
    cached = next(row for row in rows if row.caching and row.engine == "openvino" and row.precision == "bf16")
    twin = uncached_twin(latency(), cached)
    assert twin is not None
    assert twin.name == "offcut openvino bf16"
    settings = quality().rows
    assert {reference(settings, row).name for row in settings if row.sampler == "ddim"} == {"ddim 50"}  # type: ignore[union-attr]
    assert speed(settings, next(row for row in settings if row.steps == 9)) == pytest.approx(50 / 9)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123"), (0.0, "0"), (-0.5, "-0.500"), (100, "100")],
)
def test_figures_have_three_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_sizes_have_decimal_units() -> None:
    assert [size(value) for value in (None, 12, 3_438_000_000, 36_000_000)] == ["–", "12 bytes", "3.44 GB", "36.0 MB"]  # noqa: RUF001
