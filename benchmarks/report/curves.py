"""Growth as inline SVG: measured points on two logarithmic axes, each series joined by a line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .markup import Markup, svg, tag
from .words import digits

_WIDTH, _HEIGHT = 380, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 14, 12, 40


@dataclass(frozen=True)
class Curve:
    """One series: its name for the reader, its CSS class, and (x, y) pairs, all positive, x growing."""

    name: str
    kind: str
    points: Sequence[tuple[float, float]]


def curves(series: Sequence[Curve], title: str, across: str, up: str) -> Markup:
    """All series in one frame; x values are written where they were measured, y at 1, 2 and 5 times powers of ten."""
    xs = sorted({x for curve in series for x, _ in curve.points})
    ys = [y for curve in series for _, y in curve.points]
    left, right = math.log(xs[0]), math.log(xs[-1])
    low, high = math.log(min(ys)) - 0.1, math.log(max(ys)) + 0.1

    def at(x: float) -> float:
        return _LEFT + (math.log(x) - left) / ((right - left) or 1.0) * (_WIDTH - _LEFT - _RIGHT)

    def height(y: float) -> float:
        return _HEIGHT - _BOTTOM - (math.log(y) - low) / (high - low) * (_HEIGHT - _BOTTOM - _TOP)

    bottom = _HEIGHT - _BOTTOM
    drawn = []
    for tick in log_ticks(math.exp(low), math.exp(high)):
        drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=height(tick), y2=height(tick), class_="grid"))
        drawn.append(tag("text", digits(tick, 1), x=_LEFT - 6, y=height(tick) + 4, text_anchor="end", class_="tick"))
    for x in xs:
        drawn.append(tag("line", x1=at(x), x2=at(x), y1=_TOP, y2=bottom, class_="grid"))
        drawn.append(tag("text", _short(x), x=at(x), y=bottom + 16, text_anchor="middle", class_="tick"))
    drawn.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=bottom, y2=bottom, class_="axis"))
    drawn.append(tag("text", across, x=_WIDTH - _RIGHT, y=_HEIGHT - 6, text_anchor="end", class_="tick"))
    drawn.append(tag("text", up, x=_LEFT, y=_HEIGHT - 6, class_="tick"))
    for curve in series:
        path = "".join(
            f"{'L' if index else 'M'}{at(x):.1f} {height(y):.1f}" for index, (x, y) in enumerate(curve.points)
        )
        drawn.append(tag("path", d=path, class_=f"curve {curve.kind}"))
        for x, y in curve.points:
            said = tag("title", f"{curve.name}: {digits(y)} at {_short(x)}")
            drawn.append(tag("circle", said, cx=at(x), cy=height(y), r=4, class_=f"dot {curve.kind}"))
    return svg(title, tag("title", title), drawn, class_="scatter", viewBox=f"0 0 {_WIDTH} {_HEIGHT}")


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten inside a range; of a wide range the powers only."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1,) if high / low > 500 else (1, 2, 5)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    return [tick for tick in ticks if low <= tick <= high]


def _short(value: float) -> str:
    """``65536`` as ``66k``."""
    return f"{value:g}" if value < 10000 else f"{value / 1000:.0f}k"
