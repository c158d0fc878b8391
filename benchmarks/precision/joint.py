"""Caching and low precision together: CacheQuant's ablation (CVPR 2025), with tuned schedules in addition.

The rows are {fp32, int8} x {reuse, DP, DP + correction, ours}. "reuse" reuses features at an interval. "DP" follows the
schedule of CacheQuant's dynamic programming. "correction" adds a scale and a shift for each call and channel, fitted on
uncached images. "ours" is ``offcut tune`` at the same cost. All rows are compared with the uncached images in fp32. In
int8 all coefficients are fitted to the features of fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engines.bundle.bundle import Bundle
from ...runtime.generation.forecast import Coefficients, Forecast
from ...runtime.generation.schedule import Schedule, Steps, Uniform
from ...runtime.pipeline import load
from ...runtime.prompts import bundle_prompts
from ...runtime.tuning.images import ImageSet, TuningImage, TuningPipeline, reference_pipeline
from ...runtime.tuning.prediction import FeatureMoments, Ridge
from ...runtime.tuning.recording import FeatureRecorder, record
from ...runtime.tuning.report import SegmentDistances, cachequant
from ...runtime.tuning.steps import FittedForecast
from ...runtime.tuning.tune import tune
from ...runtime.tuning.tuning_request import TuningRequest
from ..progress import indented
from ..quality.front import OTHER_SEEDS
from ..quality.pictures import prompts
from ..quality.plan import CUTS, SHALLOW_OVER_FULL
from ..schema.precision import Joint, JointRow
from ..stats import mean_of
from .builds import EXACT

CUT = CUTS[0]


@dataclass(frozen=True)
class AblationTask:
    """Images and settings of the ablation.

    Attributes:
        interval: interval of reuse; the other rows have the same number of full calls.
        samples: number of images for fitting corrections, and for tuning; their prompts are tuning's defaults.
        images: number of images of each row, with other prompts and seeds.
        probes, positions: see ``TuningRequest``.
        seed: seed of the first image and of the prompts.
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
    task: AblationTask,
    progress: Callable[[str], None],
    *,
    threads: int | None = None,
) -> Joint:
    """Measure every precision with every way of caching.

    Args:
        bundle: bundle with builds of the engine in fp32 and in all precisions.
        precisions: values of ``inference_precision`` in ``offcut.load``.
    """
    exact = _load(bundle, engine, EXACT, threads)
    rows: list[JointRow] = []
    try:
        progress("images to judge by")
        test = _set(prompts(task.images, 1000 + task.seed), task.seed, task)
        test.uncached = [_pipeline(exact, task).generate(image) for image in test.images]
        for precision in precisions:
            if precision == EXACT:
                rows += _rows(exact, None, bundle, precision, task, test, progress)
                continue
            pipe = _load(bundle, engine, precision, threads)
            try:
                rows += _rows(pipe, exact, bundle, precision, task, test, progress)
            finally:
                pipe.unet.close()
    finally:
        exact.unet.close()
    return Joint(
        engine=engine,
        scheduler=type(exact.scheduler).__name__,
        steps=task.steps,
        guidance=task.guidance,
        interval=task.interval,
        cut=CUT,
        samples=task.samples,
        images=task.images,
        shallow_over_full=SHALLOW_OVER_FULL[CUT],
        rows=rows,
    )


def _load(bundle: Bundle, engine: str, precision: str, threads: int | None) -> Any:
    pipe: Any = load(bundle, engine, inference_precision=precision, threads=threads)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise, pipe.unet.record_times = False, True
    return pipe


def _pipeline(pipe: Any, task: AblationTask) -> TuningPipeline:
    return TuningPipeline(pipe, task.steps, None, {CUT: pipe.unet.cut_features[CUT]})


def _rows(
    pipe: Any,
    exact: Any,
    bundle: Bundle,
    precision: str,
    task: AblationTask,
    test: ImageSet,
    progress: Callable[[str], None],
) -> list[JointRow]:
    pipeline = _pipeline(pipe, task)
    reference = None if exact is None else reference_pipeline(pipeline, exact)
    pipe.scheduler.set_timesteps(task.steps)
    calls = len(pipe.scheduler.timesteps)
    samples = bundle_prompts(bundle)
    fit = _set([samples[place % len(samples)] for place in range(task.samples)], task.seed + OTHER_SEEDS, task)
    recorder = FeatureRecorder(
        pipe.unet, pipeline.features, task.positions, task.seed, reference=None if exact is None else exact.unet
    )
    progress(f"{precision}: images and features")
    record(pipeline, (fit, ImageSet(test.images[:1])), recorder, calls, indented(progress), reference)
    full = cachequant(calls, task.interval, SegmentDistances(fit, pipeline.features))
    corrected = FittedForecast(corrections(fit.moments, full, calls, reference=exact is not None), full)
    ways: dict[str, tuple[Schedule | None, Forecast | None]] = {
        "uncached": (None, None),
        "reuse": (Uniform(task.interval), None),
        "DP": (Steps(full), None),
        "DP + correction": (Steps(full), corrected),
    }
    progress(f"{precision}: tune")
    ratio = SHALLOW_OVER_FULL[CUT]
    request = TuningRequest(
        speed_up=calls / (len(full) + ratio * (calls - len(full))),
        steps=task.steps,
        guidance=(task.guidance, task.guidance),
        samples=task.samples,
        prompts=samples,
        probes=task.probes,
        positions=task.positions,
        seed=task.seed + OTHER_SEEDS,
        cuts=(CUT,),
        ratios={CUT: ratio},
    )
    ours = tune(pipe, bundle, "ablation", request, indented(progress), exact)
    ways["ours"] = ours.schedule, ours.forecast
    rows = []
    for way, (schedule, forecast) in ways.items():
        progress(f"{precision}: {way}")
        psnr = np.array(pipeline.psnr(test, schedule, forecast))
        rows.append(
            JointRow(
                precision=precision,
                way=way,
                timeline=pipeline.last_run.timeline,
                psnr=mean_of(psnr),
                psnr_worst=float(psnr.min()),
            )
        )
    return rows


def _set(texts: Sequence[str], seed: int, task: AblationTask) -> ImageSet:
    return ImageSet([TuningImage(text, seed + place, task.guidance) for place, text in enumerate(texts)])


def corrections(
    moments: Mapping[str, FeatureMoments], full: Sequence[int], calls: int, *, reference: bool
) -> dict[int, dict[str, Coefficients]]:
    """Return CacheQuant's corrections: by least squares a scale and shift for each shallow call and channel.

    They map the features of the last full call to those of the shallow call.

    Args:
        reference: whether the moments contain a reference's calls after the engine's own; the fit then aims at them.
    """
    ridge, offset = Ridge(0.0, slopes=False), calls if reference else 0
    coefficients: dict[int, dict[str, Coefficients]] = {}
    for call in (index for index in range(calls) if index not in full):
        last = max(index for index in full if index < call)
        coefficients[call] = {}
        for name, feature_moments in moments.items():
            fitted = ridge.fit(feature_moments, range(call + offset, call + offset + 1), last, last)
            scale, shift = (value[:, 0].clone() for value in (fitted.scale, fitted.shift))  # type: ignore[index]
            coefficients[call][name] = Coefficients(scale, 0.0, shift)
    return coefficients
