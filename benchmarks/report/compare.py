"""Comparison of two results, which finds the changes beyond noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from ...errors import UserError
from ..record import Environment, Result
from ..schema.latency import Contestant, Latency
from ..schema.quality import Quality, QualityRow
from ..stats import Estimate, by_round, difference, ratio_of_means
from .findings import base_of

Verdict = Literal["worse", "better", "small", "noise", "unknown", "appeared", "vanished"]


@dataclass(frozen=True)
class FigureChange:
    """The change of one figure in one row.

    Attributes:
        section: ``latency`` or ``quality``.
        row: name of the row.
        figure: name of the figure, with the unit of ``old`` and ``new``.
        old, new: values of the figure; None where the figure was not measured.
        percent: the change in percent or percentage points, positive if worse (see ``compare``).
        low, high: interval of ``percent``; None without an estimate of the noise.
        verdict: ``worse`` or ``better``: the change exceeds noise and threshold; ``small``: it exceeds only the noise;
            ``noise``: it does not exceed the noise; ``unknown``: the noise is unknown; ``appeared``, ``vanished``: only
            one result has the figure.
        note: a reason; empty without one.
    """

    section: str
    row: str
    figure: str
    verdict: Verdict
    old: float | None = None
    new: float | None = None
    percent: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """The changes of all figures, with warnings that say why the results may not be comparable."""

    changes: tuple[FigureChange, ...]
    warnings: tuple[str, ...]

    def worse(self, *, allow_missing: bool = False) -> tuple[FigureChange, ...]:
        """Return the changes that should fail a user's CI: worse figures, and rows that are no longer measured."""
        bad = ("worse",) if allow_missing else ("worse", "vanished")
        return tuple(change for change in self.changes if change.verdict in bad)


def compare(old: Result, new: Result, threshold: float = 0.05, confidence: float = 0.99) -> Comparison:
    """Compare rows of the same name.

    A change counts as ``worse`` or ``better`` if its interval excludes zero and the change exceeds the threshold.
    Changes of seconds and of the perceptual distance are relative. A change of PSNR is the relative change of the root
    mean square error. Changes of SSIM and accuracy are in percentage points. Between different machines, times are
    compared as ratios to a base row of the same round.

    Args:
        threshold: smallest change that counts, e.g. 0.05 for 5 %.
        confidence: confidence of the latency intervals; quality has the 95 % intervals of the results.

    Raises:
        UserError: the results share no section, or ran different tasks.
    """
    changes: list[FigureChange] = []
    warnings = list(_environments(old.environment, new.environment))
    if old.latency and new.latency:
        _same_task("latency", _LATENCY_TASK, old.latency, new.latency)
        if old.latency.threads != new.latency.threads:
            warnings.append(f"threads differ: {old.latency.threads} and {new.latency.threads}")
        warnings += _settings(old.latency, new.latency)
        base, moved = None, other_machine(old.environment, new.environment)
        if moved:
            base = _shared_base(old.latency, new.latency)
            warnings.append(
                f"seconds do not transfer between machines: times are compared as ratios to {base!r}, round by round"
                if base
                else "seconds do not transfer between machines, and no row is in both results to take ratios to"
            )
        changes += _latency(old.latency, new.latency, base, threshold, confidence, lost=moved and base is None)
    if old.quality and new.quality:
        _same_task("quality", _QUALITY_TASK, old.quality, new.quality)
        changes += _quality(old.quality, new.quality, threshold)
    for section in ("latency", "quality"):
        if (getattr(old, section) is None) is not (getattr(new, section) is None):
            warnings.append(f"only one of the results has {section} figures")
    if not changes:
        raise UserError("the two results have no row in common to compare; give two of the same offcut bench command")
    return Comparison(tuple(changes), tuple(warnings))


def other_machine(old: Environment, new: Environment) -> bool:
    """Return whether the machines differ, so that seconds do not transfer."""
    return (old.cpu, old.cores, old.gpu) != (new.cpu, new.cores, new.gpu)


_LATENCY_TASK = ("model", "steps", "height", "width", "images_per_call", "frames", "guidance", "scheduler")
_QUALITY_TASK = ("model", "guidance")


def _same_task(section: str, names: Sequence[str], old: Latency | Quality, new: Latency | Quality) -> None:
    differing = [name for name in names if getattr(old, name) != getattr(new, name)]
    if differing:
        differences = ", ".join(f"{name} {getattr(old, name)!r} and {getattr(new, name)!r}" for name in differing)
        raise UserError(f"the two {section} results ran different tasks ({differences}); compare runs of the same one")


def _environments(old: Environment, new: Environment) -> Iterator[str]:
    for name in ("cpu", "cores", "memory_gib", "gpu", "system", "python"):
        if getattr(old, name) != getattr(new, name):
            yield f"{name.removesuffix('_gib')} differs: {getattr(old, name)} and {getattr(new, name)}"
    for package in sorted(old.packages.keys() | new.packages.keys()):
        before, after = old.packages.get(package, "none"), new.packages.get(package, "none")
        if before != after:
            yield f"{package} differs: {before} and {after}"
    for which, environment in (("older", old), ("newer", new)):
        if environment.load is not None and environment.load > 0.5:
            yield f"the machine was not idle when the {which} run began: load average {environment.load:g}"


def _settings(old: Latency, new: Latency) -> Iterator[str]:
    after = {row.name: row for row in new.contestants}
    for row in old.contestants:
        if row.name not in after:
            continue
        mine, theirs = _fixed(row), _fixed(after[row.name])
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                yield f"{row.name}: {name} differs: {mine.get(name, 'none')} and {theirs.get(name, 'none')}"


def _fixed(row: Contestant) -> dict[str, str]:
    own = {"engine": row.engine, "precision": row.precision, "caching": row.caching or "none"}
    if row.loops:
        own |= {"full calls": str(row.full_calls), "shallow calls": str(row.shallow_calls)}
    return own | row.settings


def _shared_base(old: Latency, new: Latency) -> str | None:
    measured = {row.name for row in new.contestants if row.loops}
    shared = [row for row in old.contestants if row.loops and row.name in measured]
    base = base_of(shared)
    return base.name if base else None


_SECONDS = (("loop", "loops"), ("full call", "full"), ("shallow call", "shallow"))


def _latency(
    old: Latency, new: Latency, base: str | None, threshold: float, confidence: float, lost: bool
) -> Iterator[FigureChange]:
    before, after = ({row.name: row for row in run.contestants} for run in (old, new))
    for name in [*before, *(name for name in after if name not in before)]:
        first, second = before.get(name), after.get(name)
        ran = [row is not None and bool(row.loops) for row in (first, second)]
        if not first or not second or not all(ran):
            if any(ran):
                reason = (second.not_run if second else None) or ""
                yield FigureChange("latency", name, "row", "vanished" if ran[0] else "appeared", note=reason)
            continue
        for figure, field in _SECONDS:
            mine, theirs = (by_round(getattr(row, field), len(row.loops)) for row in (first, second))
            if not mine or not theirs or (name == base and field == "loops"):
                continue
            unit = "s"
            if base:
                mine, theirs = _over(mine, before[base].loops), _over(theirs, after[base].loops)
                unit = f"of {base}"
            percent = None if lost else _percent(ratio_of_means(mine, theirs, confidence))
            yield _judged(
                "latency",
                name,
                f"{figure}, {unit}",
                statistics.median(mine),
                statistics.median(theirs),
                percent,
                threshold,
                missing="another machine" if lost else "one round only",
            )


def _over(values: Sequence[float], base: Sequence[float]) -> list[float]:
    return [value / other for value, other in zip(values, base, strict=False)]


def _percent(interval: Estimate | None) -> Estimate | None:
    if interval is None:
        return None
    mean, low, high = (100 * (value - 1) for value in (interval.mean, interval.low, interval.high))
    return Estimate(mean=mean, low=low, high=high)


_ESTIMATES = (("psnr", "dB"), ("ssim", ""), ("distance", ""), ("accuracy", ""))


def _quality(old: Quality, new: Quality, threshold: float) -> Iterator[FigureChange]:
    before, after = ({row.name: row for row in run.rows} for run in (old, new))
    for name in [*before, *(name for name in after if name not in before)]:
        first, second = before.get(name), after.get(name)
        if not first or not second:
            yield FigureChange("quality", name, "row", "vanished" if first else "appeared")
            continue
        if (first.full_calls, first.shallow_calls) != (second.full_calls, second.shallow_calls):
            yield _calls(name, first, second, threshold)
        for metric, unit in _ESTIMATES:
            mine, theirs = getattr(first, metric), getattr(second, metric)
            if mine is None or theirs is None:
                if mine is not theirs:
                    yield FigureChange("quality", name, metric, "vanished" if mine else "appeared")
                continue
            label = f"{metric}, {unit}" if unit else metric
            yield _judged("quality", name, label, mine.mean, theirs.mean, _loss(metric, mine, theirs), threshold)
        if first.frechet is not None and second.frechet is not None:
            yield _judged(
                "quality", name, "frechet", first.frechet, second.frechet, None, threshold, missing="no interval"
            )


def _calls(name: str, first: QualityRow, second: QualityRow, threshold: float) -> FigureChange:
    """Return the change of a row's cost, which has no noise."""
    percent = 100 * (second.cost / first.cost - 1)
    exact = Estimate(mean=percent, low=percent, high=percent)
    return _judged("quality", name, "cost, full calls", first.cost, second.cost, exact, threshold)


def _loss(metric: str, old: Estimate, new: Estimate) -> Estimate:
    """Return the change in percent or percentage points, positive if worse."""
    change = difference(old, new)
    bounds = (change.mean, change.high, change.low)
    if metric == "distance":
        scale = 100 / old.mean if old.mean else math.inf
        mean, low, high = (value * scale if value else 0.0 for value in (change.mean, change.low, change.high))
    elif metric == "psnr":  # 20 log10 of the error, so that a difference in dB is a ratio of errors
        mean, low, high = (100 * (10 ** (-value / 20) - 1) for value in bounds)
    else:
        mean, low, high = (-100 * value for value in bounds)
    return Estimate(mean=mean, low=low, high=high)


def _judged(
    section: str, row: str, figure: str, old: float, new: float, percent: Estimate | None, threshold: float,
    missing: str = "",
) -> FigureChange:  # fmt: skip
    if percent is None:
        return FigureChange(section, row, figure, "noise" if old == new else "unknown", old, new, note=missing)
    verdict: Verdict = "noise"
    if percent.excludes(0):
        verdict = "small"
        if abs(percent.mean) > 100 * threshold:
            verdict = "worse" if percent.mean > 0 else "better"
    return FigureChange(section, row, figure, verdict, old, new, percent.mean, percent.low, percent.high)
