"""Settings for the Pareto front of quality and speed: tuned schedules, and other settings at the same cost.

Each schedule is tuned at the cost of a uniform interval, with Stable Diffusion 1.5's time ratio of shallow to full
calls. The compared images have other prompts and seeds. The bundle stores the schedules for later runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ...engines.bundle.bundle import Bundle
from ...errors import ScheduleError
from ...runtime.generation.schedule import Steps
from ...runtime.tuning.artifact import Tuned, choose, make_key, save
from ...runtime.tuning.tune import tune
from ...runtime.tuning.tuning_request import TuningRequest
from ..progress import indented
from . import pictures
from .plan import CUTS, SAMPLERS, BundleSchedule, QualitySetting, cached, check

INTERVALS = (2, 3, 5, 10)
_DAMPING = {"ddim": 1.0}  # damping of forecasts; 0.5 for other samplers
_OTHER_PROMPTS = 9000
OTHER_SEEDS = 1_000_000
"""Seed of the first image for tuning; judged images have lower seeds."""


def known(steps: int, samplers: Sequence[str] = SAMPLERS) -> list[QualitySetting]:
    """Return the settings without tuning: for each sampler and interval reuse without and with warm-up, and a forecast.

    Args:
        steps: number of DDIM steps; other samplers have half as many.

    Raises:
        UserError: a sampler is unknown.
    """
    check(samplers)
    rows = []
    for sampler in samplers:
        own = steps if sampler == "ddim" else max(4, steps // 2)
        rows.append(QualitySetting(sampler, own))
        for interval in INTERVALS:
            rows += [
                cached(sampler, own, "uniform", interval),
                cached(sampler, own, "uniform", interval, warmup=2),
                cached(sampler, own, "uniform", interval, warmup=2, damping=_DAMPING.get(sampler, 0.5)),
            ]
    return rows


def front_plan(
    pipe: Any,
    bundle: Bundle,
    settings: Sequence[QualitySetting],
    guidance: float,
    ratios: Mapping[str, float],
    samples: int,
    progress: Callable[[str], None] = lambda text: None,
) -> list[QualitySetting]:
    """Return the settings, and for each uniform one without warm-up a tuned and CacheQuant's schedule at its cost.

    Args:
        pipe: pipeline of the bundle.
        bundle: the bundle; missing schedules are tuned and added to it.
        settings: result of ``known``.
        ratios: time of a shallow call divided by that of a full call, by cut.
        samples: number of images for tuning a schedule.
        progress: called with the name of each stage.
    """
    rows = list(settings)
    for plain in settings:
        if plain.schedule != f"uniform:{plain.interval}" or plain.damping is not None:
            continue
        tuned = _tuned(pipe, bundle, plain, guidance, ratios, samples, progress)
        bundle = Bundle.open(bundle.path)
        theirs = next(row for row in tuned.document.measured if row.name == "CacheQuant's schedule")
        rows += [
            QualitySetting(plain.sampler, plain.steps, str(Steps(theirs.full)), plain.cut),
            of_bundle(bundle, tuned, plain.sampler),
        ]
    return rows


def of_bundle(bundle: Bundle, tuned: Tuned, sampler: str) -> QualitySetting:
    """Return the setting that uses a bundle's schedule."""
    document = tuned.document
    schedule = BundleSchedule(tuned.name, bundle.manifest.schedules[tuned.name].document, document.by_call)
    return QualitySetting(sampler, document.key.steps, f"tuned:{tuned.name}", document.cut, bundle_schedule=schedule)


def _tuned(
    pipe: Any,
    bundle: Bundle,
    plain: QualitySetting,
    guidance: float,
    ratios: Mapping[str, float],
    samples: int,
    progress: Callable[[str], None],
) -> Tuned:
    """Return the bundle's tuned schedule at the cost of a uniform one; a missing one is tuned and added."""
    name = f"front-{plain.sampler.replace('+', 'p').replace(' ', '-')}-{plain.steps}-n{plain.interval}-s{samples}"
    before = pipe.scheduler
    pipe.scheduler = pictures.scheduler(before.config, plain.sampler)
    try:
        key = make_key(bundle, pipe.scheduler, plain.steps, (guidance, guidance))
        if name in bundle.manifest.schedules:
            try:
                stored = choose(bundle, key, name, pipe.unet.cuts)
            except ScheduleError:
                stored = None
            if stored is not None and stored.document.shallow_over_full == ratios[CUTS[0]]:
                return stored
            progress(f"{name} in the bundle was tuned for other settings: tune it again")
        request = TuningRequest(
            speed_up=plain.steps / plain.cost(ratios),
            steps=plain.steps,
            guidance=(guidance, guidance),
            samples=samples,
            prompts=pictures.prompts(samples, _OTHER_PROMPTS),
            cuts=(CUTS[0],),
            ratios={CUTS[0]: ratios[CUTS[0]]},
            seed=OTHER_SEEDS,
        )
        progress(f"tune {plain.sampler}, {plain.steps} steps, at the cost of interval {plain.interval}")
        tuned = tune(pipe, bundle, name, request, indented(progress))
    finally:
        pipe.scheduler = before
    save(bundle, tuned)
    return tuned
