"""Sweeps of one quantity at a time: the loop of ``offcut bench latency``, each setting in a process of its own."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ...errors import UserError
from ...runtime.generation.schedule import Uniform, parse
from ..latency.case import LatencyRequest
from ..latency.resolve import model_name, resolve
from ..latency.rounds import RoundOptions, measure
from ..schema.growth import Axis, Fit, Growth, Point, Sweep
from ..schema.latency import Contestant, Latency


@dataclass(frozen=True)
class SweepValues:
    """The values of each sweep, to which the base's own value is added; an empty sweep is left out.

    Attributes:
        steps: of the scheduler. Multiples of the interval keep the share of full calls.
        images: of one pipeline call.
        sides: of a square image, in pixels.
        intervals: 1 is uncached.
    """

    steps: Sequence[int] = ()
    images: Sequence[int] = ()
    sides: Sequence[int] = ()
    intervals: Sequence[int] = ()


def grow(
    bundle: Bundle, base: LatencyRequest, axes: SweepValues, options: RoundOptions, precision: str | None = None
) -> Growth:
    """Measure the base, every axis, and the base again.

    Args:
        base: with one engine, no peers and a uniform schedule.
        options: of each setting's run.
        precision: of the engine's builds in the bundle; None takes the first.

    Raises:
        UserError: the base is invalid, or a setting could not be measured.
    """
    schedule = parse(base.schedule)
    if not isinstance(schedule, Uniform):
        raise UserError(f"offcut bench growth varies a uniform interval, not {base.schedule}")
    run = _Runs(bundle, precision, options)
    first = run.at(base)
    case = first.latency
    settings = _settings(base, axes, schedule.interval, case.height * case.width)
    sweeps = []
    for axis, own, others in settings:
        points = {own: first.point(own)}
        points |= {value: run.at(request, uncached=uncached).point(value) for value, request, uncached in others}
        sweeps.append(_sweep(axis, [points[value] for value in sorted(points)]))
    again = run.at(base)
    return Growth(
        model=model_name(bundle),
        contestant=first.row.name,
        base={
            "steps": case.steps,
            "images": case.images_per_call,
            **({} if case.frames is None else {"frames": case.frames}),
            "height": case.height,
            "width": case.width,
            "interval": schedule.interval,
            "cut": str(first.row.caching).rpartition(", ")[2],
            "guidance": case.guidance,
            "scheduler": case.scheduler,
            "threads": case.threads or 0,
        },
        rounds=options.rounds,
        clock=case.clock,
        sweeps=sweeps,
        drift=statistics.median(again.row.loops) / statistics.median(first.row.loops),
    )


_Others = list[tuple[int, LatencyRequest, bool]]


def _settings(
    base: LatencyRequest, axes: SweepValues, interval: int, pixels: int
) -> Iterator[tuple[Axis, int, _Others]]:
    """Yield each axis with the base's value, and its other values: request, and whether it is uncached."""
    if axes.steps:
        yield "steps", base.steps, [(n, replace(base, steps=n), False) for n in _others(axes.steps, base.steps)]
    if axes.images:
        yield "images", base.images, [(n, replace(base, images=n), False) for n in _others(axes.images, base.images)]
    if axes.sides:
        squares: _Others = [
            (side * side, replace(base, height=side, width=side), False)
            for side in _others(axes.sides, 0)
            if side * side != pixels
        ]
        yield "pixels", pixels, squares
    if axes.intervals:
        cached: _Others = [
            (n, base if n == 1 else replace(base, schedule=f"uniform:{n}"), n == 1)
            for n in _others(axes.intervals, interval)
        ]
        yield "interval", interval, cached


def _others(values: Sequence[int], own: int) -> list[int]:
    return sorted(set(values) - {own})


@dataclass(frozen=True)
class _SettingRun:
    latency: Latency
    row: Contestant

    def point(self, value: int) -> Point:
        names = ("loops", "full", "shallow", "host_peak_bytes", "device_peak_bytes")
        return Point(value=value, **{name: getattr(self.row, name) for name in names})


@dataclass(frozen=True)
class _Runs:
    bundle: Bundle
    precision: str | None
    options: RoundOptions

    def at(self, request: LatencyRequest, *, uncached: bool = False) -> _SettingRun:
        """Measure one contestant with one setting."""
        with tempfile.TemporaryDirectory(prefix="offcut-growth-") as folder:
            case, entrants = resolve(self.bundle, replace(request, peers=("engine",)), Path(folder))
            ours = [entrant for entrant in entrants if self.precision in (None, entrant.precision)]
            entrant = next((each for each in ours if each.cached != uncached), None)
            if entrant is None:
                available = ", ".join(dict.fromkeys(each.precision for each in entrants))
                raise UserError(f"{self.bundle.path} has no {self.precision} build of this engine; it has {available}")
            if entrant.not_run is not None:
                raise UserError(f"{entrant.name} cannot be measured: {entrant.not_run}")
            setting = f"{case.steps} steps, {case.images} image(s), {case.height}x{case.width}"
            setting += ", uncached" if uncached else f", {case.schedule}"
            latency = measure(case, [entrant], replace(self.options, progress=self._details_of(setting)), "")
        (row,) = latency.contestants
        if row.not_run is not None:
            raise UserError(f"{entrant.name} failed at {setting}: {row.not_run}; see {self.options.log}")
        return _SettingRun(latency, row)

    def _details_of(self, setting: str) -> Callable[[str], None]:
        """Show the setting as one stage, and what happens in it as details."""
        self.options.progress(setting)
        return lambda sentence: self.options.progress(f"  {sentence}")


def _sweep(axis: Axis, points: list[Point]) -> Sweep:
    laws: list[Fit | None] = [_law("loop", points, [point.loop for point in points])]
    if axis in ("images", "pixels"):
        for of, calls in (("full call", [p.full for p in points]), ("shallow call", [p.shallow for p in points])):
            laws.append(_law(of, points, [statistics.median(each) for each in calls]))
    memory = [point.device_peak_bytes or point.host_peak_bytes for point in points]
    if all(memory):
        laws.append(_law("memory", points, [float(value or 0) for value in memory]))
    return Sweep(axis=axis, points=points, fits=[law for law in laws if law is not None])


def _law(of: str, points: Sequence[Point], values: Sequence[float]) -> Fit | None:
    return power_law(of, [point.value for point in points], values)


def power_law(of: str, x: Sequence[float], y: Sequence[float]) -> Fit | None:
    """Return the exponent of ``y = c * x ** exponent``, by least squares; None with fewer than two different ``x``.

    Args:
        of: what grows.
        x, y: positive.
    """
    if len(set(x)) < 2:
        return None
    import numpy as np

    logarithms = np.log(x), np.log(y)
    if len(x) == 2:
        return Fit(of=of, exponent=float(np.polyfit(*logarithms, 1)[0]), error=None, points=2)
    (exponent, _), covariance = np.polyfit(*logarithms, 1, cov=True)
    return Fit(of=of, exponent=float(exponent), error=float(np.sqrt(covariance[0, 0])), points=len(x))
