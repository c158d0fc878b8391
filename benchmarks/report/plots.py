"""Plots by matplotlib as SVG in the page's colours, light and dark."""

from __future__ import annotations

import functools
import html
import io
import re
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ParamSpec

from ..stats import Estimate, require
from .findings import front
from .formatting import TIMES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")

COLOURS = {
    name: f"#0000{place:02x}"
    for place, name in enumerate(("ink", "muted", "line", "paper", "full", "shallow", "rest", "whole"), start=1)
}
"""Placeholder colours, which `to_svg` replaces with the page's CSS variables of these names."""

_STYLE: Any = {  # matplotlib's names of settings
    "axes.edgecolor": COLOURS["muted"],
    "axes.facecolor": "none",
    "axes.labelcolor": COLOURS["muted"],
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.facecolor": "none",
    "font.size": 9,
    "grid.color": COLOURS["line"],
    "legend.edgecolor": "none",
    "legend.facecolor": "none",
    "legend.labelcolor": COLOURS["ink"],
    "svg.fonttype": "none",  # text stays text in the page's font
    "svg.hashsalt": "offcut",
    "text.color": COLOURS["ink"],
    "text.parse_math": False,
    "xtick.color": COLOURS["muted"],
    "ytick.color": COLOURS["muted"],
}


@dataclass(frozen=True)
class Bar:
    """The time of a denoising loop in seconds, with its parts.

    Attributes:
        total: median of the loops.
        least, most: minimum and maximum over the rounds.
        full, shallow: sum of all full and of all shallow calls of a loop; None if unknown.
    """

    label: str
    total: float
    least: float
    most: float
    full: float | None = None
    shallow: float | None = None

    @property
    def pieces(self) -> list[tuple[str, float, float]]:
        """Colour, start and end of each piece; calls that take longer than the loop end with it."""
        if self.full is None:
            return [("whole", 0.0, self.total)]
        calls = self.full + (self.shallow or 0.0)
        ends = [0.0, *(min(end, self.total) for end in (self.full, calls, self.total))]
        pieces = zip(("full", "shallow", "rest"), ends, ends[1:], strict=False)
        return [piece for piece in pieces if piece[2] > piece[1]]

    @property
    def ideal(self) -> float | None:
        """Sum of the calls' seconds."""
        return None if self.full is None else self.full + (self.shallow or 0.0)


@dataclass(frozen=True)
class ScatterPoint:
    """A setting in a plot of quality against speed; ``series`` is the kind of the row."""

    label: str
    speed: float
    value: Estimate
    series: str


def _styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    @functools.wraps(draw)
    def styled(*args: P.args, **options: P.kwargs) -> Figure:
        require("a report's plot", "matplotlib")
        import matplotlib

        with matplotlib.rc_context(_STYLE):
            return draw(*args, **options)

    return styled


@_styled
def bars(rows: Sequence[Bar]) -> Figure:
    """Return horizontal bars of full calls, shallow calls and the rest, with range and ideal; the first is on top."""
    figure, axes = _figure(0.7 + 0.42 * len(rows))
    names = {"full": "full UNet calls", "shallow": "shallow calls", "rest": "rest of the loop", "whole": "not split"}
    for place, row in enumerate(rows):
        for kind, start, end in row.pieces:
            label = names.pop(kind, None)
            axes.barh(place, end - start, 0.42, start, color=COLOURS[kind], label=label)
        axes.plot((row.least, row.most), (place, place), color=COLOURS["ink"], linewidth=1)
        if row.ideal is not None:
            axes.plot((row.ideal,) * 2, (place - 0.3, place + 0.3), color=COLOURS["ink"], linewidth=2)
        axes.text(0, place - 0.3, textwrap.shorten(row.label, 90, placeholder="…"), va="bottom", fontsize=8)
    axes.plot([], [], color=COLOURS["ink"], linewidth=2, label="ideal: the calls alone")
    axes.plot([], [], color=COLOURS["ink"], linewidth=1, label="range of the rounds")
    axes.set(ylim=(len(rows) - 0.4, -1), xlim=(0, None), yticks=[], xlabel="seconds of a denoising loop, median")
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper left", ncols=3, fontsize=8)
    return figure


@_styled
def scatter(points: Sequence[ScatterPoint], label: str, *, more_is_better: bool = True) -> Figure:
    """Return a plot of quality against speed; points on the Pareto front are filled and joined."""
    figure, axes = _figure(3.6)
    colours = {"cached": ("full", "o"), "fewer steps": ("shallow", "D"), "uncached": ("ink", "s")}
    sign = 1 if more_is_better else -1
    best = front([(point.speed, sign * point.value.mean) for point in points])
    for series, (colour, marker) in colours.items():
        for place, point in enumerate(points):
            if point.series == series:
                spread = [[point.value.mean - point.value.low], [point.value.high - point.value.mean]]
                inside = COLOURS[colour if place in best else "paper"]
                axes.errorbar(point.speed, point.value.mean, spread, fmt=marker, markersize=5, markerfacecolor=inside,
                              color=COLOURS[colour], elinewidth=0.7)  # fmt: skip
        if any(point.series == series for point in points):
            axes.plot([], [], marker, color=COLOURS[colour], label=series)
    corners = [(points[place].speed, points[place].value.mean) for place in best]
    axes.step(*zip(*corners, strict=True), where="post", color=COLOURS["muted"], linestyle="--", linewidth=1,
              label="Pareto front")  # fmt: skip
    axes.set(xlabel=f"times faster ({TIMES})", ylabel=label)
    axes.grid()
    figure.legend(loc="outside upper left", ncols=4, fontsize=8)
    figure.draw_without_rendering()
    _name_points(axes, [points[place] for place in [*best, *(set(range(len(points))) - set(best))]])
    return figure


def _name_points(axes: Axes, points: Sequence[ScatterPoint]) -> None:
    """Write each label that overlaps no earlier label."""
    placed: list[Any] = []
    for point in points:
        for x, y, align in ((6, 4, "left"), (-6, 4, "right"), (6, -10, "left"), (-6, -10, "right")):
            text = axes.annotate(point.label, (point.speed, point.value.mean), (x, y), textcoords="offset points",
                                 ha=align, fontsize=7)  # fmt: skip
            box = text.get_window_extent()
            inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
            if inside and not any(box.overlaps(other) for other in placed):
                placed.append(box)
                break
            text.remove()


def to_svg(figure: Figure, title: str) -> str:
    """Return a figure as an SVG element with the page's colours and font."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    stream = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(stream, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = stream.getvalue()
    svg = svg[svg.index("<svg") :]
    head, _, body = svg.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # ids of artists, which nothing refers to
    for name, colour in COLOURS.items():
        body = body.replace(colour, f"var(--{name})")
    return f'<svg {view[0]} role="img" aria-label="{html.escape(title)}">{body.strip()}'


def _figure(height: float) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()
