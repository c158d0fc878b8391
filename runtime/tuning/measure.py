"""What tuning looks at before it chooses: features of uncached images, the engine's times, and what errors do."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch

from ...errors import UserError
from ..generation.schedule import Steps, Uniform
from .images import ImageSet, Studio
from .predictors import Predictors
from .record import Recorder
from .report import Costs
from .search import Array
from .watched import Watch

Progress = Callable[[str], None]


def record(
    studio: Studio,
    sets: Sequence[ImageSet],
    recorder: Recorder,
    calls: int,
    progress: Progress,
    reference: Studio | None = None,
    watch: Watch | None = None,
) -> Costs:
    """Uncached images, their features, and the times of the engine's calls.

    Args:
        sets: get pictures, and all but the last latents and the moments of their features.
        calls: that the scheduler makes of the UNet.
        reference: draws the pictures that others are held against; None for the studio itself.
        watch: of the pipeline that draws them, for their latents; None if nobody wants those.

    Raises:
        UserError: the pipeline makes another number.
    """
    done, total = 0, sum(len(each.images) for each in sets)
    seconds: list[float] = []
    progress("draw uncached images")
    for each in sets:
        for image in each.images:
            done += 1
            progress(f"  {done} of {total}")
            seen: AbstractContextManager[list[torch.Tensor]] = nullcontext([]) if watch is None else watch.latents()
            if reference is None:
                with recorder.watch(), seen as latents:
                    drawn = studio.draw(image)
            else:
                with recorder.watch():
                    studio.draw(image)
                with seen as latents:
                    drawn = reference.draw(image)
            each.pictures.append(drawn)
            if each is not sets[-1]:
                each.latents.append(latents)
                each.moments = each.moments or recorder.empty()
                recorder.add_to(each.moments)
            seconds += studio.run.seconds
    made = len(studio.run.full)
    if made != calls:
        raise UserError(
            f"{type(studio.pipe).__name__} calls its UNet {made} times in {studio.steps} steps, not "
            f"{calls} times as its scheduler says: this pipeline cannot be tuned"
        )
    whole = statistics.median(seconds)
    return Costs(calls, {cut: _shallow_seconds(studio, sets[1], cut) / whole for cut in studio.cuts}, whole)


def _shallow_seconds(studio: Studio, select: ImageSet, cut: str) -> float:
    """Of a shallow call of this cut, by a cached image."""
    studio.draw(select.images[0], Uniform(2), cut=cut)
    run = studio.run
    return statistics.median(seconds for seconds, full in zip(run.seconds, run.full, strict=True) if not full)


def influence(
    studio: Studio,
    select: ImageSet,
    reuse: Mapping[str, Predictors],
    probes: int,
    progress: Progress,
) -> dict[str, Array]:
    """How far an error of a cut's features, relative to their size, moves the final latent at each call.

    Measured at a few calls: there alone the features of the call before are reused. The others are interpolated.

    Args:
        reuse: knows what reuse misses, by cut.
        probes: how many calls.

    Returns:
        For each cut [calls].
    """
    progress("measure each call's influence on the image")
    total = next(iter(reuse.values())).calls
    calls = sorted({round(place) for place in np.linspace(1, total - 1, min(probes, total - 1))})
    images = select.images[:2]
    moved = {cut: np.zeros(len(calls)) for cut in reuse}
    for number, image in enumerate(images):
        whole = studio.draw(image, output="latent").float()
        for cut in reuse:
            at = f", {cut}" if len(reuse) > 1 else ""
            for index, call in enumerate(calls):
                progress(f"  call {call}, image {number + 1} of {len(images)}{at}")
                schedule = Steps([other for other in range(total) if other != call])
                latent = studio.draw(image, schedule, cut=cut, output="latent").float()
                moved[cut][index] += float((latent - whole).norm() / whole.norm()) / len(images)
    found = {}
    for cut, errors in reuse.items():
        missed = [math.sqrt(float(errors.reuse_errors(call - 1, call + 1)[0])) for call in calls]
        measured = np.maximum(moved[cut], 1e-9) / np.maximum(missed, 1e-9)
        found[cut] = np.exp(np.interp(np.arange(total), calls, np.log(measured)))
    return found
