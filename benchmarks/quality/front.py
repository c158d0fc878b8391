"""Plan of the Pareto front of quality and speed: tuned schedules and other ways that are as fast.

Each schedule is tuned for the ratio of Stable Diffusion 1.5, at the cost of an interval of DeepCache's, on prompts and
seeds that the compared images do not have. The bundle stores it, so that an interrupted run continues.
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
_DAMPING = {"ddim": 1.0}  # of forecasts, where not a half
_OTHER_PROMPTS = 9000
OTHER_SEEDS = 1_000_000
"""First seed of the images for tuning; judged images have lower seeds."""


def known(steps: int, samplers: Sequence[str] = SAMPLERS) -> list[QualitySetting]:
    """Return settings without tuning: for each sampler and interval reuse, with and without warm-up, and a forecast.

    Args:
        steps: of DDIM; other samplers have half of them.

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
    """Return the settings, and for each uniform one without warm-up a tuned schedule as fast, and CacheQuant's.

    Args:
        pipe: of the bundle.
        bundle: gets the schedules that it lacks.
        settings: as ``known`` gives them.
        ratios: a shallow call's time over a full one's, by cut.
        samples: number of images that a schedule is tuned with.
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
    """Return the setting of a bundle's schedule."""
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
    """Return a schedule as fast as a plain one: the bundle's, or a new one, tuned and added to the bundle."""
    name = f"front-{plain.sampler.replace('+', 'p').replace(' ', '-')}-{plain.steps}-n{plain.interval}-s{samples}"
    before = pipe.scheduler
    pipe.scheduler = pictures.scheduler(before.config, plain.sampler)
    try:
        key = make_key(bundle, pipe.scheduler, plain.steps, (guidance, guidance))
        if name in bundle.manifest.schedules:
            try:
                there = choose(bundle, key, name, pipe.unet.cuts)
            except ScheduleError:
                there = None
            if there is not None and there.document.shallow_over_full == ratios[CUTS[0]]:
                return there
            progress(f"{name} in the bundle was made for other settings: tune it again")
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
        progress(f"tune {plain.sampler}, {plain.steps} steps, as fast as every {plain.interval}th call full")
        tuned = tune(pipe, bundle, name, request, indented(progress))
    finally:
        pipe.scheduler = before
    save(bundle, tuned)
    return tuned
