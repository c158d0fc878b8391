"""Caching and low precision together: CacheQuant's ablation (CVPR 2025), with the tuned schedules beside it.

{fp32, int8} x {reuse, DP, DP + correction, ours}: plain reuse at an interval; the schedule of its dynamic programming;
with its correction, a scale and a shift for each call and channel, fitted on uncached images; and ``offcut tune`` at
no more full calls. All are held against the uncached images in fp32, and in int8 all coefficients aim at fp32's
features.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..runtime.forecast import Coefficients, Forecast
from ..runtime.pipeline import load
from ..runtime.schedule import Schedule, Steps, Uniform
from ..runtime.tuning.images import Studio, three_sets
from ..runtime.tuning.measure import record
from ..runtime.tuning.moments import Moments, Ridge
from ..runtime.tuning.record import Recorder
from ..runtime.tuning.reference import beside
from ..runtime.tuning.report import Differences
from ..runtime.tuning.search import cachequant
from ..runtime.tuning.steps import Fitted
from ..runtime.tuning.tune import tune
from ..runtime.tuning.wanted import Target, Wanted

if TYPE_CHECKING:
    from ..engines.bundle import Bundle

WAYS = ("uncached", "reuse", "DP", "DP + correction", "ours")
RATIO = 0.1
"""Of a shallow call's time to a full one's, that the tuned schedules are budgeted with: SD 1.5's on a CPU."""


@dataclass(frozen=True)
class Row:
    """Test images of one precision with one way of caching.

    Attributes:
        full_calls: of ``calls``.
        psnr: mean, in dB, to the uncached images in fp32; 100 where they are the same.
        worst: the least.
    """

    precision: str
    way: str
    full_calls: int
    calls: int
    psnr: float
    worst: float


@dataclass(frozen=True)
class Task:
    """What is drawn; arguments as those of ``tuning.wanted.Wanted``."""

    prompts: tuple[str, ...]
    interval: int
    steps: int
    guidance: float
    samples: int
    probes: int = 8
    positions: int = 1024
    seed: int = 0


def ablation(
    bundle: Bundle, engine: str, precisions: Sequence[str], task: Task, progress: Callable[[str], None], **options: Any
) -> list[Row]:
    """Measure every precision with every way.

    Args:
        bundle: with builds of the engine in fp32 and in all precisions.
        options: of ``offcut.load``, e.g. ``threads``.
    """
    exact = load(bundle, engine, inference_precision="fp32", **options)
    rows: list[Row] = []
    try:
        for precision in precisions:
            if precision == "fp32":
                rows += _of(exact, None, bundle, precision, task, progress)
                continue
            pipe = load(bundle, engine, inference_precision=precision, **options)
            try:
                rows += _of(pipe, exact, bundle, precision, task, progress)
            finally:
                pipe.unet.close()
    finally:
        exact.unet.close()
    return rows


def _of(
    pipe: Any, exact: Any, bundle: Bundle, precision: str, task: Task, progress: Callable[[str], None]
) -> list[Row]:
    unet = pipe.unet
    cut = unet.cuts[0]
    studio = Studio(pipe, task.steps, None, {cut: unet._cuts[cut]})
    reference = None if exact is None else beside(studio, exact)
    scales = (task.guidance, task.guidance)
    fit, select, test = three_sets(task.prompts, task.samples, scales, task.seed)
    pipe.set_progress_bar_config(disable=True)
    if exact is not None:
        exact.set_progress_bar_config(disable=True)
    unet.advise, unet.record_times = False, True
    pipe.scheduler.set_timesteps(task.steps)
    calls = len(pipe.scheduler.timesteps)
    recorder = Recorder(
        unet, studio.features, task.positions, task.seed, reference=None if exact is None else exact.unet
    )
    progress(f"{precision}: images and features")
    record(studio, (fit, select, test), recorder, calls, _indented(progress), reference)
    full = cachequant(calls, task.interval, Differences(fit, studio.features))
    corrected = Fitted(corrections(fit.moments, full, calls, reference=exact is not None), full)
    ways: dict[str, tuple[Schedule | None, Forecast | None]] = {
        "uncached": (None, None),
        "reuse": (Uniform(task.interval), None),
        "DP": (Steps(full), None),
        "DP + correction": (Steps(full), corrected),
    }
    progress(f"{precision}: tune")
    spent = len(full) + RATIO * (calls - len(full))
    wanted = Wanted(
        Target(speed_up=calls / spent),
        steps=task.steps,
        guidance=scales,
        samples=task.samples,
        prompts=task.prompts,
        probes=task.probes,
        positions=task.positions,
        seed=task.seed,
        ratios={cut: RATIO},
    )
    ours = tune(pipe, bundle, "ablation", wanted, _indented(progress), exact)
    ways["ours"] = ours.schedule, ours.forecast
    unet.advise = False
    rows = []
    for way, (schedule, forecast) in ways.items():
        progress(f"{precision}: {way}")
        near = studio.psnr(test, schedule, forecast)
        made = studio.run.full
        rows.append(Row(precision, way, sum(made), len(made), statistics.fmean(near), min(near)))
    return rows


def corrections(
    moments: Mapping[str, Moments], full: Sequence[int], calls: int, *, reference: bool
) -> dict[int, dict[str, Coefficients]]:
    """CacheQuant's: for each shallow call and channel the scale and shift of least squares, from the last full call.

    Args:
        reference: whether the moments have a reference's calls behind the engine's own, to aim at.
    """
    plain, behind = Ridge(0.0, slopes=False), calls if reference else 0
    made: dict[int, dict[str, Coefficients]] = {}
    for call in (each for each in range(calls) if each not in full):
        last = max(each for each in full if each < call)
        made[call] = {}
        for name, each in moments.items():
            fitted = plain.fit(each, range(call + behind, call + behind + 1), last, last)
            scale, shift = (value[:, 0].clone() for value in (fitted.scale, fitted.shift))  # type: ignore[index]
            made[call][name] = Coefficients(scale, 0.0, shift)
    return made


def _indented(progress: Callable[[str], None]) -> Callable[[str], None]:
    return lambda sentence: progress(f"  {sentence}")
