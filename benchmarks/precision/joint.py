"""Caching and low precision together: CacheQuant's ablation (CVPR 2025), with the tuned schedules beside it.

{fp32, int8} x {reuse, DP, DP + correction, ours}: plain reuse at an interval; the schedule of its dynamic programming;
with its correction, a scale and a shift for each call and channel, fitted on uncached images; and ``offcut tune`` at
the same cost. All are held against the uncached images in fp32, and in int8 all coefficients aim at fp32's features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.bundle import Bundle
from ...runtime.forecast import Coefficients, Forecast
from ...runtime.pipeline import load
from ...runtime.prompts import prompts_for
from ...runtime.schedule import Schedule, Steps, Uniform
from ...runtime.tuning.images import Image, ImageSet, Studio
from ...runtime.tuning.measure import record
from ...runtime.tuning.moments import Moments, Ridge
from ...runtime.tuning.record import Recorder
from ...runtime.tuning.reference import beside
from ...runtime.tuning.report import Differences
from ...runtime.tuning.search import cachequant
from ...runtime.tuning.steps import Fitted
from ...runtime.tuning.tune import tune
from ...runtime.tuning.wanted import Target, Wanted
from ..quality import metrics
from ..quality.pictures import prompts
from ..quality.plan import CUTS, SHALLOW_OVER_FULL
from .builds import EXACT
from .record import Joint, JointRow

_OTHER_SEEDS = 1_000_000  # of the samples


@dataclass(frozen=True)
class Task:
    """What is drawn.

    Attributes:
        interval: that reuse has, and whose full calls the others may spend.
        samples: images that corrections are fitted to, and as many that schedules are tuned with, of the prompts that
            tuning draws by default.
        images: of each row, of other prompts and seeds.
        probes, positions: as those of ``tuning.wanted.Wanted``.
        seed: of the first image; its prompts follow from it too.
    """

    interval: int = 5
    steps: int = 30
    guidance: float = 3.0
    samples: int = 32
    images: int = 64
    probes: int = 8
    positions: int = 1024
    seed: int = 0


def ablation(
    bundle: Bundle,
    engine: str,
    precisions: Sequence[str],
    task: Task,
    progress: Callable[[str], None],
    *,
    threads: int | None = None,
) -> Joint:
    """Measure every precision with every way.

    Args:
        bundle: with builds of the engine in fp32 and in all precisions.
        precisions: as ``offcut.load``'s ``inference_precision``.
    """
    exact = load(bundle, engine, inference_precision=EXACT, threads=threads)
    rows: list[JointRow] = []
    try:
        for precision in precisions:
            if precision == EXACT:
                rows += _of(exact, None, bundle, precision, task, progress)
                continue
            pipe = load(bundle, engine, inference_precision=precision, threads=threads)
            try:
                rows += _of(pipe, exact, bundle, precision, task, progress)
            finally:
                pipe.unet.close()
        scheduler, cut = type(exact.scheduler).__name__, exact.unet.cuts[0]
    finally:
        exact.unet.close()
    return Joint(
        engine=engine,
        scheduler=scheduler,
        steps=task.steps,
        guidance=task.guidance,
        interval=task.interval,
        cut=cut,
        samples=task.samples,
        images=task.images,
        shallow_over_full=SHALLOW_OVER_FULL[CUTS[0]],
        rows=rows,
    )


def _of(
    pipe: Any, exact: Any, bundle: Bundle, precision: str, task: Task, progress: Callable[[str], None]
) -> list[JointRow]:
    unet = pipe.unet
    cut = unet.cuts[0]
    studio = Studio(pipe, task.steps, None, {cut: unet._cuts[cut]})
    reference = None if exact is None else beside(studio, exact)
    for each in (pipe, exact):
        if each is not None:
            each.set_progress_bar_config(disable=True)
    unet.advise, unet.record_times = False, True
    pipe.scheduler.set_timesteps(task.steps)
    calls = len(pipe.scheduler.timesteps)
    samples = prompts_for(bundle.path, None)
    fit = _set([samples[place % len(samples)] for place in range(task.samples)], task.seed + _OTHER_SEEDS, task)
    test = _set(prompts(task.images, 1000 + task.seed), task.seed, task)
    recorder = Recorder(
        unet, studio.features, task.positions, task.seed, reference=None if exact is None else exact.unet
    )
    progress(f"{precision}: images and features")
    record(studio, (fit, ImageSet(test.images[:1])), recorder, calls, _indented(progress), reference)
    test.pictures = [(reference or studio).draw(image) for image in test.images]
    full = cachequant(calls, task.interval, Differences(fit, studio.features))
    corrected = Fitted(corrections(fit.moments, full, calls, reference=exact is not None), full)
    ways: dict[str, tuple[Schedule | None, Forecast | None]] = {
        "uncached": (None, None),
        "reuse": (Uniform(task.interval), None),
        "DP": (Steps(full), None),
        "DP + correction": (Steps(full), corrected),
    }
    progress(f"{precision}: tune")
    ratio = SHALLOW_OVER_FULL[CUTS[0]]
    wanted = Wanted(
        Target(speed_up=calls / (len(full) + ratio * (calls - len(full)))),
        steps=task.steps,
        guidance=(task.guidance, task.guidance),
        samples=task.samples,
        prompts=samples,
        probes=task.probes,
        positions=task.positions,
        seed=task.seed + _OTHER_SEEDS,
        ratios={cut: ratio},
    )
    ours = tune(pipe, bundle, "ablation", wanted, _indented(progress), exact)
    ways["ours"] = ours.schedule, ours.forecast
    unet.advise = False
    rows = []
    for way, (schedule, forecast) in ways.items():
        progress(f"{precision}: {way}")
        near = np.array(studio.psnr(test, schedule, forecast))
        rows.append(
            JointRow(
                precision=precision,
                way=way,
                timeline=studio.run.timeline,
                psnr=metrics.estimate(near),
                psnr_worst=float(near.min()),
            )
        )
    return rows


def _set(texts: Sequence[str], seed: int, task: Task) -> ImageSet:
    return ImageSet([Image(text, seed + place, task.guidance) for place, text in enumerate(texts)])


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
    return lambda sentence: progress(f"  {sentence.strip()}")
