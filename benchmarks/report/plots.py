"""Plots as inline SVG, without a library: bars of loops, quality against speed, timelines of calls.

Horizontal places are in percent of the width where a plot holds no text, so that it is as wide as the page; a plot with
text has a fixed view box of about its width on the page. Colours are the page's CSS classes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from .findings import front
from .markup import Markup, svg, tag
from .words import TIMES, digits, times

_BAR = 22


@dataclass(frozen=True)
class Bar:
    """A loop's time and what it is made of, in seconds; None where a part is not known.

    Attributes:
        total: the median loop.
        least, most: over the rounds.
        full, shallow: what all full and all shallow calls of a loop take together.
    """

    total: float
    least: float
    most: float
    full: float | None = None
    shallow: float | None = None

    @property
    def ideal(self) -> float | None:
        return None if self.full is None else self.full + (self.shallow or 0.0)


def bar(parts: Bar, end: float, ticks: Sequence[float], title: str) -> Markup:
    """One bar of a scale that ends at ``end`` seconds: full calls, shallow calls, the rest; the ideal as a tick."""
    drawn = [_vertical(100 * tick / end, "grid", 0, _BAR) for tick in ticks]
    if parts.full is None:
        drawn.append(_piece(0, parts.total, end, "whole"))
    else:
        shallow = parts.shallow or 0.0
        ends = [parts.full, parts.full + shallow, parts.total]
        for start, stop, kind in zip([0.0, *ends], ends, ("full", "shallow", "rest"), strict=False):
            if min(stop, parts.total) > start:
                drawn.append(_piece(start, min(stop, parts.total), end, kind))
    drawn.append(_horizontal(100 * parts.least / end, 100 * parts.most / end, "range", _BAR / 2))
    if parts.ideal is not None:
        drawn.append(_vertical(100 * parts.ideal / end, "halo", 0, _BAR))
        drawn.append(_vertical(100 * parts.ideal / end, "ideal", 0, _BAR))
    return svg(title, tag("title", title), drawn, class_="bar", width="100%", height=_BAR)


def _piece(start: float, stop: float, end: float, kind: str) -> Markup:
    x, width = 100 * start / end, 100 * (stop - start) / end
    return tag("rect", x=f"{x:.3f}%", width=f"{width:.3f}%", y=4, height=_BAR - 8, class_=kind)


def _vertical(x: float, kind: str, top: float, bottom: float) -> Markup:
    return tag("line", x1=f"{x:.3f}%", x2=f"{x:.3f}%", y1=top, y2=bottom, class_=kind)


def _horizontal(left: float, right: float, kind: str, y: float) -> Markup:
    return tag("line", x1=f"{left:.3f}%", x2=f"{right:.3f}%", y1=y, y2=y, class_=kind)


def nice_ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers inside a range, as many as are about asked for; more than none for any range that is not empty."""
    span = high - low
    if not span > 0 or not math.isfinite(span):
        return [low]
    raw = span / about
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def timeline(calls: str, title: str) -> Markup:
    """A mark for each UNet call, tall for a full one and flat where no engine runs."""
    marks = []
    width = 100 / len(calls)
    for index, call in enumerate(calls):
        x = index * width
        mark, top = {"#": ("full", 0), "_": ("skipped", 16)}.get(call, ("shallow", 12))
        place = {"x": f"{x:.3f}%", "width": f"{width * 0.8:.3f}%"}
        marks.append(tag("rect", class_=mark, y=top, height=18 - top, **place))
    return svg(title, tag("title", title), marks, class_="timeline", width="100%", height=18)


Box = tuple[float, float, float, float]
"""Left, top, width, height."""


@dataclass(frozen=True)
class Point:
    """One setting: how many times cheaper it is, what it scores with its interval, and to which series it belongs."""

    label: str
    name: str
    speed: float
    value: float
    low: float
    high: float
    series: str


_WIDTH, _HEIGHT = 380, 280
_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 12, 14, 40


def scatter(points: Sequence[Point], title: str, unit: str, *, more_is_better: bool = True) -> Markup:
    """Score against speed. Points that nothing beats in both are filled and joined by the front's stairs."""
    sign = 1 if more_is_better else -1
    best = front([(point.speed, sign * point.value) for point in points])
    left, right = _range([1.0, *(point.speed for point in points)], 0.06)
    low, high = _range([edge for point in points for edge in (point.low, point.high)], 0.07)

    def x(speed: float) -> float:
        return _LEFT + (speed - left) / (right - left) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    drawn = [*_axes(x, y, (left, right), (low, high), unit)]
    drawn += [_stairs([(x(points[index].speed), y(points[index].value)) for index in best])]
    boxes = [(x(point.speed) - 6, y(point.value) - 6, 12.0, 12.0) for point in points]
    boxes += [(x(point.speed) - 1, y(point.high), 2.0, y(point.low) - y(point.high)) for point in points]
    boxes += _covered([(x(points[index].speed), y(points[index].value)) for index in best])
    for index, point in enumerate(points):
        drawn.append(_mark(point, x(point.speed), y(point.value), y(point.low), y(point.high), index in best))
    for index in [*best, *(index for index in range(len(points)) if index not in best)]:
        if placed := _label(points[index].label, x(points[index].speed), y(points[index].value), boxes):
            drawn.append(placed)
    return svg(title, tag("title", title), drawn, class_="scatter", viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def _range(values: Sequence[float], margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    spare = (high - low) * margin or max(abs(low), 1.0) * margin
    return low - spare, high + spare


def _axes(
    x: Callable[[float], float],
    y: Callable[[float], float],
    across: tuple[float, float],
    up: tuple[float, float],
    unit: str,
) -> list[Markup]:
    bottom = _HEIGHT - _BOTTOM
    drawn = []
    for tick in nice_ticks(*up):
        drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(tick), y2=y(tick), class_="grid"))
        drawn.append(tag("text", f"{tick:g}", x=_LEFT - 6, y=y(tick) + 4, text_anchor="end", class_="tick"))
    for tick in nice_ticks(*across, about=6):
        drawn.append(tag("line", x1=x(tick), x2=x(tick), y1=_TOP, y2=bottom, class_="grid"))
        drawn.append(tag("text", f"{tick:g}{TIMES}", x=x(tick), y=bottom + 16, text_anchor="middle", class_="tick"))
    drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    drawn.append(tag("text", "faster →", x=_WIDTH - _RIGHT, y=_HEIGHT - 6, text_anchor="end", class_="tick"))
    drawn.append(tag("text", unit, x=_LEFT, y=_HEIGHT - 6, class_="tick"))
    return drawn


def _stairs(corners: Sequence[tuple[float, float]]) -> Markup:
    """From the fastest corner: up only when slower."""
    path = ""
    for index, (across, down) in enumerate(corners):
        path += f"M{across:.1f} {down:.1f}" if index == 0 else f"H{across:.1f}V{down:.1f}"
    return tag("path", d=path or "M0 0", class_="front")


def _covered(corners: Sequence[tuple[float, float]]) -> Iterator[Box]:
    """Where the stairs run, for labels to stay clear of."""
    for (right, level), (left, end) in itertools.pairwise(corners):
        yield left, level - 1, right - left, 2.0
        yield left - 1, min(level, end), 2.0, abs(end - level)


def _mark(point: Point, x: float, y: float, low: float, high: float, best: bool) -> Markup:
    kind = f"{point.series.replace(' ', '-')}{' best' if best else ''}"
    said = (
        f"{point.name}: {times(point.speed)} faster, {digits(point.value)} [{digits(point.low)}, {digits(point.high)}]"
    )
    whisker = tag("line", x1=x, x2=x, y1=low, y2=high, class_="whisker")
    if point.series == "cached":
        shape = tag("circle", cx=x, cy=y, r=5)
    else:
        shape = tag("path", d=f"M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z")
    return tag("g", tag("title", said), whisker, shape, class_=f"point {kind}")


def _label(text: str, x: float, y: float, taken: list[Box]) -> Markup | None:
    """Beside its point where no other label, mark or border is; nowhere rather than over one of them."""
    width = 6.2 * len(text)
    for left, top in (
        (x + 9, y - 6), (x - 9 - width, y - 6), (x + 7, y - 18), (x - 7 - width, y + 6),
        (x + 7, y + 6), (x - 7 - width, y - 18), (x - width / 2, y - 21), (x - width / 2, y + 9),
    ):  # fmt: skip
        inside = left >= _LEFT and left + width <= _WIDTH - 2 and top >= 2 and top + 12 <= _HEIGHT - _BOTTOM
        if inside and not any(_meet((left, top, width, 12.0), box) for box in taken):
            taken.append((left, top, width, 12.0))
            return tag("text", text, x=left, y=top + 10, class_="name")
    return None


def _meet(one: Box, other: Box) -> bool:
    return (
        one[0] < other[0] + other[2]
        and other[0] < one[0] + one[2]
        and one[1] < other[1] + other[3]
        and other[1] < one[1] + one[3]
    )
