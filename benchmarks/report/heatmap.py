"""The matrix of drift as inline SVG: calls against calls, in shades of one colour, with a schedule drawn on it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from .markup import Markup, svg, tag

SHADES = 10
"""Of the page's colour, none to full: the CSS classes ``h0`` to ``h9``."""

_SIDE, _LEFT, _TOP, _BOTTOM = 360, 34, 8, 34


def heatmap(rows: Sequence[Sequence[float]], segments: Sequence[tuple[int, int]], most: float, title: str) -> Markup:
    """Row s has the values of columns s + 1 and on; the rest is empty.

    Args:
        rows: of all calls but the last.
        segments: of the schedule, each a full call and the call at which the next one is due: outlined in its row.
        most: the value of the fullest shade.
    """
    calls = len(rows) + 1
    side = _SIDE / calls
    cells = []
    for row, values in enumerate(rows):
        column = row + 1
        for shade, run in itertools.groupby(_shade(value, most) for value in values):
            length = len(list(run))
            cells.append(_box(column * side, row * side, length * side, side, f"h{shade}"))
            column += length
    drawn = [_box(row * side, row * side, side, side, "full") for row, _ in segments]
    drawn += [_box((row + 1) * side, row * side, (until - row - 1) * side, side, "used") for row, until in segments
              if until > row + 1]  # fmt: skip
    labels = list(_labels(calls, side))
    width, height = _LEFT + _SIDE + 6, _TOP + _SIDE + _BOTTOM
    return svg(title, tag("title", title), cells, drawn, labels, class_="heatmap", viewBox=f"0 0 {width} {height}")


def _shade(value: float, most: float) -> int:
    return min(SHADES - 1, int(SHADES * value / most)) if most > 0 else 0


def _box(x: float, y: float, width: float, height: float, kind: str) -> Markup:
    return tag("rect", x=_LEFT + x, y=_TOP + y, width=width, height=height, class_=kind)


def _labels(calls: int, side: float) -> Iterator[Markup]:
    step = next(each for each in (1, 2, 5, 10, 20, 50, 100, 200, 500) if calls / each <= 10 or each == 500)
    bottom = _TOP + _SIDE
    for call in range(0, calls, step):
        middle = (call + 0.5) * side
        yield tag("text", str(call), x=_LEFT - 5, y=_TOP + middle + 4, text_anchor="end")
        yield tag("text", str(call), x=_LEFT + middle, y=bottom + 14, text_anchor="middle")
    yield tag("text", "features of call", x=_LEFT + 4, y=bottom - 6)
    yield tag("text", "used at call", x=_LEFT + _SIDE, y=bottom + 29, text_anchor="end")


def steps(series: Sequence[tuple[str, Sequence[float | None]]], most: float, title: str, up: str) -> Markup:
    """Values by call, from 0 to ``most``, a line each; None breaks a line.

    Args:
        series: each with its CSS class.
        up: what is drawn, and its unit.
    """
    width, height, left, right, top, bottom = 720, 200, 40, 8, 18, 26
    calls = len(series[0][1])

    def at(call: int, value: float) -> tuple[float, float]:
        x = left + (call + 0.5) / calls * (width - left - right)
        return x, height - bottom - value / (most or 1.0) * (height - bottom - top)

    drawn = [tag("text", up, x=left, y=11)]
    for share in (0.0, 0.5, 1.0):
        _, y = at(0, share * most)
        drawn.append(tag("line", x1=left, x2=width - right, y1=y, y2=y, class_="grid"))
        drawn.append(tag("text", f"{100 * share * most:.3g}", x=left - 5, y=y + 4, text_anchor="end"))
    step = max(1, round(calls / 10))
    for call in range(0, calls, step):
        drawn.append(tag("text", str(call), x=at(call, 0)[0], y=height - bottom + 16, text_anchor="middle"))
    drawn.append(tag("text", "call", x=width - right, y=height - 2, text_anchor="end"))
    for kind, values in series:
        path, pen = "", "M"
        for call, value in enumerate(values):
            if value is None:
                pen = "M"
                continue
            x, y = at(call, value)
            path += f"{pen}{x:.1f} {y:.1f}"
            pen = "L"
        drawn.append(tag("path", d=path, class_=f"curve {kind}"))
        for call, value in enumerate(values):
            if value is not None:
                x, y = at(call, value)
                drawn.append(tag("circle", cx=x, cy=y, r=2.5, class_=f"dot {kind}"))
    return svg(title, tag("title", title), drawn, class_="steps", viewBox=f"0 0 {width} {height}")
