"""Settings that a quality run compares, and the cost of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ...exporter.cut import canonical_name
from ...runtime.generation.forecast import Extrapolate, Forecast
from ...runtime.generation.schedule import Quad, Schedule, Uniform, parse
from ...runtime.tuning.search import cost_in_full_calls

SAMPLERS = ("ddim", "dpm++ 2m", "euler ancestral")
"""Names of the samplers: two deterministic ones, and one that adds new noise at every step."""

INTERVALS = (1, 2, 3, 5, 10)
CUTS = ("deepcache:0", "deepcache:1", "deepcache:2", "deepcache:3")
WARMUPS = (0, 1, 2, 3)

SHALLOW_OVER_FULL: Mapping[str, float] = {
    "deepcache:0": 0.10,
    "deepcache:1": 0.22,
    "deepcache:2": 0.38,
    "deepcache:3": 0.47,
}
"""Time of a shallow call divided by that of a full call, on Stable Diffusion 1.5 at 512x512 with guidance.

The ratio of `deepcache:0` was measured (ONNX Runtime, fp32, CPU); the others are ratios of
floating-point operations, as ``offcut cuts`` counts them. ``--shallow-ratio`` gives an engine's own ratio.
"""

_BASE = 5  # the interval at which the other parameters vary
_TOLERANCE = 0.06  # largest relative difference of two costs that count as equal

Kind = Literal["uniform", "quad"]


@dataclass(frozen=True)
class BundleSchedule:
    """A schedule that a bundle stores.

    Attributes:
        name: name of the schedule in the bundle.
        document: name of the schedule's file, which changes with its content.
        by_call: the cut of each call, as in ``Document.by_call``.
    """

    name: str
    document: str
    by_call: tuple[str | None, ...]


@dataclass(frozen=True)
class QualitySetting:
    """One way to generate the images.

    Attributes:
        sampler: one of `SAMPLERS`.
        steps: number of sampler steps; each is one UNet call.
        schedule: schedule as text, ``tuned:NAME`` for a bundle's schedule; None makes every call full.
        cut: cut of the shallow calls; None without shallow calls.
        fewer: whether this is an uncached run with fewer steps, at the latency of a cached run.
        damping: damping of the forecast of cached features; None reuses the features.
        bundle_schedule: the bundle's schedule, if the setting uses one.
    """

    sampler: str
    steps: int
    schedule: str | None = None
    cut: str | None = None
    fewer: bool = False
    damping: float | None = None
    bundle_schedule: BundleSchedule | None = None

    @property
    def identity(self) -> str:
        """Text of everything that the images depend on."""
        return self.name if self.bundle_schedule is None else f"{self.name} {self.bundle_schedule.document}"

    @property
    def name(self) -> str:
        """Name of the setting, unique in a run, e.g. ``ddim 50, uniform:5:warmup=2, deepcache:0``."""
        caching = "uncached" if self.schedule is None else f"{self.schedule}, {self.cut}"
        forecast = "" if self.damping is None else f", forecast {self.damping:g}"
        return f"{self.sampler} {self.steps}, {caching}{forecast}"

    @property
    def kind(self) -> str:
        """Kind of the setting, as in `QualityRow.kind`."""
        return "fewer steps" if self.fewer else "uncached" if self.schedule is None else "cached"

    @property
    def parsed(self) -> Schedule | None:
        """The schedule; None where every call is full, and for the bundle's schedules."""
        return None if self.schedule is None or self.bundle_schedule is not None else parse(self.schedule)

    @property
    def forecast(self) -> Forecast | None:
        """Forecast of the cached features in shallow calls; None where the features are reused."""
        return None if self.damping is None else Extrapolate(self.damping)

    @property
    def interval(self) -> int | None:
        """Interval of a uniform or quad schedule; 1 where every call is full, None for other schedules."""
        schedule = self.parsed
        if self.schedule is None:
            return 1
        return schedule.interval if isinstance(schedule, Uniform | Quad) else None

    @property
    def full_calls(self) -> int:
        """Number of full calls for one image."""
        if self.bundle_schedule is not None:
            return self.bundle_schedule.by_call.count(None)
        schedule = self.parsed
        return self.steps if schedule is None else len(schedule.full_calls(self.steps))

    def cost(self, ratios: Mapping[str, float]) -> float:
        """Return the cost of one image in full calls; a shallow call counts as the ratio of its cut."""
        if self.bundle_schedule is not None:
            return cost_in_full_calls(self.bundle_schedule.by_call, ratios)
        shallow = self.steps - self.full_calls
        return self.full_calls + (shallow * ratios[self.cut] if self.cut else 0.0)


def cached(
    sampler: str,
    steps: int,
    kind: Kind,
    interval: int,
    cut: str = CUTS[0],
    warmup: int = 0,
    damping: float | None = None,
) -> QualitySetting:
    """Return a setting with caching, or the uncached setting if the interval is 1.

    A quad schedule has the paper's centre, call 15 of 50, scaled to the number of steps.
    """
    if interval == 1:
        return QualitySetting(sampler, steps)
    center = round(0.3 * steps)
    schedule = Uniform(interval, warmup=warmup) if kind == "uniform" else Quad(interval, center, warmup=warmup)
    return QualitySetting(sampler, steps, str(schedule), canonical_name(cut), damping=damping)


def full_plan(steps: int) -> list[QualitySetting]:
    """Return the uniform interval 5 with DDIM and `deepcache:0`, and settings that differ from it in one parameter.

    Other samplers have half the steps. Settings with a forecast have two warm-up calls, which the forecast needs.
    """
    rows = [cached("ddim", steps, "uniform", interval) for interval in INTERVALS]
    rows += [cached("ddim", steps, "quad", interval) for interval in (_BASE, 10)]
    rows += [cached("ddim", steps, "uniform", _BASE, cut) for cut in CUTS[1:]]
    rows += [cached("ddim", steps, "uniform", _BASE, warmup=warmup) for warmup in WARMUPS[1:]]
    rows += [cached("ddim", steps, "uniform", interval, warmup=2, damping=1.0) for interval in (3, _BASE, 10)]
    rows.append(cached("ddim", steps, "uniform", _BASE, warmup=2, damping=0.5))
    for sampler in SAMPLERS[1:]:
        half = max(4, steps // 2)
        rows += [cached(sampler, half, "uniform", interval) for interval in (1, 3, _BASE, 10)]
        rows.append(cached(sampler, half, "uniform", _BASE, warmup=2))
        rows += [cached(sampler, half, "uniform", interval, warmup=2, damping=0.5) for interval in (3, _BASE)]
        rows.append(cached(sampler, half, "quad", 10))
    return rows


def quick_plan(steps: int) -> list[QualitySetting]:
    """Return a few settings for a quick run: both schedules, two intervals, one ancestral sampler."""
    rows = [cached("ddim", steps, "uniform", interval) for interval in (1, 3, 10)]
    rows.append(cached("ddim", steps, "quad", 10))
    half = max(4, steps // 2)
    return rows + [cached("euler ancestral", half, "uniform", interval, warmup=2) for interval in (1, 3)]


def product_plan(
    steps: int,
    samplers: Sequence[str],
    kinds: Sequence[Kind],
    intervals: Sequence[int],
    cuts: Sequence[str],
    warmups: Sequence[int],
    dampings: Sequence[float | None] = (None,),
) -> list[QualitySetting]:
    """Return every combination of these parameters, and the uncached setting of each sampler.

    Raises:
        UserError: a sampler is unknown.
        ScheduleError, CutError: another parameter is not valid.
    """
    check(samplers)
    rows = [QualitySetting(sampler, steps) for sampler in samplers]
    rows += [
        cached(sampler, steps, kind, interval, cut, warmup, damping)
        for sampler in samplers
        for kind in kinds
        for interval in intervals
        for cut in cuts
        for warmup in warmups
        for damping in dampings
    ]
    return list(dict.fromkeys(rows))


def of_samplers(settings: Sequence[QualitySetting], samplers: Sequence[str]) -> list[QualitySetting]:
    """Return the settings of a plan with these samplers.

    Raises:
        UserError: a sampler is unknown, or the plan has none of them.
    """
    check(samplers)
    rows = [setting for setting in settings if setting.sampler in samplers]
    if not rows:
        samplers_of_plan = ", ".join(dict.fromkeys(setting.sampler for setting in settings))
        raise UserError(
            f"this plan has {samplers_of_plan}, not {', '.join(samplers)}: give --plan full, or omit --plan"
        )
    return rows


def with_fewer_steps(settings: Sequence[QualitySetting], ratios: Mapping[str, float]) -> list[QualitySetting]:
    """Return the settings, and for each cached one an uncached setting with fewer steps at about the same cost.

    One such setting serves all cached settings whose costs differ from its own by at most 6 %.
    """
    rows = list(dict.fromkeys(settings))
    shortened: list[QualitySetting] = []
    for setting in (row for row in rows if row.schedule):
        steps = max(1, round(setting.cost(ratios)))
        if steps < setting.steps and not any(_fits(other, setting, ratios) for other in shortened):
            shortened.append(QualitySetting(setting.sampler, steps, fewer=True))
    return rows + shortened


def reference_ratios(settings: Sequence[QualitySetting], own: Mapping[str, float]) -> dict[str, float]:
    """Return the time of a shallow call divided by that of a full call on Stable Diffusion 1.5, by cut.

    Args:
        own: ratios of the user that replace those of `SHALLOW_OVER_FULL`, by cut.

    Raises:
        UserError: a ratio is not between 0 and 1, or a cut has no ratio.
    """
    ratios = {**SHALLOW_OVER_FULL, **{canonical_name(cut): ratio for cut, ratio in own.items()}}
    for setting in settings:
        if setting.cut and setting.cut not in ratios:
            raise UserError(
                f"shallow calls of {setting.cut} were not measured on Stable Diffusion 1.5: give the ratio of a "
                f"shallow to a full call, e.g. --shallow-ratio {setting.cut}=0.2"
            )
    for cut, ratio in ratios.items():
        if not 0 < ratio < 1:
            raise UserError(f"the shallow ratio of {cut} is {ratio:g}, but must lie between 0 and 1")
    return ratios


def _fits(fewer: QualitySetting, setting: QualitySetting, ratios: Mapping[str, float]) -> bool:
    cost = setting.cost(ratios)
    return fewer.sampler == setting.sampler and abs(fewer.steps - cost) <= max(0.5, _TOLERANCE * cost)


def check(samplers: Sequence[str]) -> None:
    """Check that all names are in ``SAMPLERS``.

    Raises:
        UserError: a name is not in ``SAMPLERS``.
    """
    for sampler in samplers:
        if sampler not in SAMPLERS:
            raise UserError(f"{sampler!r} is not a sampler of this benchmark: choose one of {', '.join(SAMPLERS)}")


def reference(setting: QualitySetting, rows: Iterable[QualitySetting]) -> QualitySetting:
    """Return the uncached setting of the same sampler, with which this setting is compared."""
    return next(row for row in rows if row.kind == "uncached" and row.sampler == setting.sampler)
