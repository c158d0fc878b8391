"""Where things are drawn: fronts against brute force, ticks inside their range, bars as long as their parts."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.results import contestant, latency, quality

from offcut.benchmarks.report.findings import base_of, front, reference, speed, uncached_twin
from offcut.benchmarks.report.markup import Markup, join, tag
from offcut.benchmarks.report.plots import Bar, Point, bar, nice_ticks, scatter, timeline
from offcut.benchmarks.report.words import digits, size

POINTS = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6)).map(lambda p: (float(p[0]), float(p[1]))), max_size=12
)


@given(POINTS)
def test_the_front_is_what_nothing_beats(points: list[tuple[float, float]]) -> None:
    kept = front(points)
    for index, point in enumerate(points):
        beaten = [o for o in points if o != point and o[0] >= point[0] and o[1] >= point[1]]
        assert (point in [points[place] for place in kept]) is (not beaten), index
    assert [points[place][0] for place in kept] == sorted({points[place][0] for place in kept}, reverse=True)


@given(st.floats(-1e4, 1e4), st.floats(1e-3, 1e5))
def test_ticks_are_inside_and_evenly_spaced(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 2 <= len(ticks) <= 11
    assert all(low - 1e-6 * span <= tick <= low + span * 1.000001 for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-3)
    assert nice_ticks(3, 3) == [3]


def widths(markup: str) -> dict[str, float]:
    return {kind: float(width) for width, kind in re.findall(r'width="([\d.]+)%"[^>]*class="(\w+)"', markup)}


def test_a_bar_is_as_long_as_its_parts_with_the_ideal_at_the_end_of_the_calls() -> None:
    drawn = bar(Bar(total=8, least=7, most=9, full=5, shallow=2), 10, [], "x")
    assert widths(drawn) == {"full": 50, "shallow": 20, "rest": 10}
    assert 'x1="70.000%" x2="70.000%" y1="0" y2="22" class="ideal"' in drawn
    assert 'x1="70.000%" x2="90.000%" y1="11" y2="11" class="range"' in drawn
    assert widths(bar(Bar(8, 7, 9), 10, [], "x")) == {"whole": 80}


def test_calls_that_take_longer_than_the_loop_do_not_draw_beyond_it() -> None:
    assert widths(bar(Bar(total=8, least=7, most=9, full=7, shallow=2), 10, [], "x")) == {"full": 70, "shallow": 10}


def test_a_timeline_has_a_mark_for_each_call() -> None:
    drawn = timeline("#..#.", "x")
    assert "".join(kind[0] for kind in re.findall(r'<rect class="(\w+)"', drawn)) == "fssfs"


def test_a_scatter_fills_the_front_only_and_names_every_point() -> None:
    points = [
        Point("a", "row a", 1.5, 40, 39, 41, "cached"),
        Point("b", "row b", 2.5, 30, 29, 31, "cached"),
        Point("c", "row c", 1.4, 20, 19, 21, "fewer steps"),
    ]
    drawn = scatter(points, "x", "dB")
    assert drawn.count("cached best") == 2
    assert '"point fewer-steps"' in drawn
    for point in points:
        assert f"{point.name}: {point.speed:.2f}" in drawn
    turned = scatter(points, "x", "distance", more_is_better=False)
    assert '"point fewer-steps best"' in turned
    assert "cached best" in turned
    scatter(points[:1], "x", "dB")


def test_rows_are_compared_with_whom_they_should() -> None:
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


def test_markup_escapes_once() -> None:
    assert tag("p", "<b>", tag("i", "&"), None, title='"') == '<p title="&quot;">&lt;b&gt;<i>&amp;</i></p>'
    assert join([Markup("<br>"), "<br>"]) == "<br>&lt;br&gt;"
    assert tag("input", checked=True, disabled=False, type="radio") == '<input checked type="radio">'
    assert tag("line", x1=1.0, stroke_width=2.25) == '<line x1="1" stroke-width="2.25"/>'


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1234"), (12.345, "12.3"), (0.012345, "0.0123"), (0.0, "0"), (-0.5, "-0.500"), (100, "100")],
)
def test_digits(value: float, text: str) -> None:
    assert digits(value) == text


def test_sizes() -> None:
    assert [size(value) for value in (None, 12, 3_438_000_000, 36_000_000)] == ["–", "12 bytes", "3.44 GB", "36.0 MB"]  # noqa: RUF001
