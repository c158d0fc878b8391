"""Drift of cached features: images generated uncached and with a schedule, from the same seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...errors import UserError
from ...runtime.generation.forecast import Forecast
from ...runtime.generation.schedule import Schedule
from ...runtime.generation.state import Run
from ...runtime.images.metrics import finite_psnr
from ...runtime.text_to_image import is_text_to_image
from ...runtime.tuning.images import TuningImage, TuningPipeline
from ...runtime.tuning.prediction import FeatureMoments, Predictors
from ...runtime.tuning.recording import FeatureRecorder
from ..latency.resolve import model_name
from ..schema.drift import Call, Drift, Sample

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

    from ...engines.bundle.bundle import Bundle

SHOWN = 4
"""Number of images that are saved."""

# Dark to light, each step lighter than the last, so that it also reads without colour.
_RAMP = np.array([(13, 12, 34), (74, 25, 92), (150, 44, 80), (214, 92, 54), (244, 170, 66), (252, 250, 214)], float)


@dataclass(frozen=True)
class DriftRequest:
    """What to measure.

    Attributes:
        cut: of the shallow calls for which the schedule names none; None for the bundle's first.
        forecast: as ``UNet.set_schedule`` takes it.
        steps: of the pipeline's scheduler.
        guidance: scale.
        prompts: used in turn.
        images: number of images; image i starts from seed ``seed + i``.
        size: height and width in pixels; None is the model's own.
        positions: of a feature, that are compared.
    """

    schedule: Schedule
    cut: str | None
    forecast: Forecast | None
    steps: int
    guidance: float
    prompts: tuple[str, ...]
    images: int = 8
    size: int | None = None
    seed: int = 0
    positions: int = 1024


def drift(
    pipe: Any, bundle: Bundle, precision: str, request: DriftRequest, folder: Path, stage: Callable[[str], None]
) -> Drift:
    """Measure a pipeline of ``offcut.load`` with its present scheduler.

    Args:
        bundle: of the pipeline.
        precision: name of the engine's precision in the result.
        folder: gets the sample images.

    Raises:
        UserError: the pipeline takes more than a prompt, the schedule has no shallow call, or the folder cannot be
            written.
    """
    if not is_text_to_image(pipe.__call__):
        raise UserError(f"{type(pipe).__name__} takes more than a prompt; give a text-to-image bundle")
    unet = pipe.unet
    unet.set_schedule(request.schedule, request.cut, request.forecast)
    cut, names = unet.cut, unet.scheduled_features
    by_cut = {each: unet.cut_features.get(each, ()) for each in unet.scheduled_cuts}
    if not names:
        raise UserError("no call of this schedule reads cached features: give a schedule with shallow calls")
    pipeline = TuningPipeline(pipe, request.steps, request.size, {cut: unet.cut_features[cut]} | by_cut)
    images = [
        TuningImage(request.prompts[index % len(request.prompts)], request.seed + index, request.guidance)
        for index in range(request.images)
    ]
    with _quietly(pipe):
        recorder = FeatureRecorder(unet, names, request.positions, request.seed, record_reads=True)
        moments: dict[str, FeatureMoments] = {}
        whole = []
        stage("generate uncached images")
        for image in images:
            with recorder.watch():
                whole.append(pipeline.generate(image))
            moments = moments or recorder.empty_moments()
            recorder.add_to(moments)
        stage("generate images with the schedule")
        errors, cached = _Errors(by_cut), []
        for image in images:
            with recorder.watch():
                cached.append(pipeline.generate(image, request.schedule, request.forecast, cut=cut))
            errors.add(recorder, pipeline.last_run)
    samples, name, most = _save(folder, images, whole, cached)
    return Drift(
        model=model_name(bundle),
        engine=unet.engine,
        precision=precision,
        scheduler=type(pipe.scheduler).__name__,
        steps=request.steps,
        guidance=request.guidance,
        schedule=str(request.schedule) if request.schedule.kind != "tuned" else "tuned",
        forecast=None if request.forecast is None else str(request.forecast),
        features=list(names),
        images=len(images),
        distances=_distances(moments),
        calls=errors.calls(),
        samples=samples,
        mean_changed=name,
        mean_most=most,
    )


@contextmanager
def _quietly(pipe: Any) -> Iterator[None]:
    pipe.set_progress_bar_config(disable=True)
    advises, pipe.unet.advise = pipe.unet.advise, False
    try:
        yield
    finally:
        pipe.unet.advise = advises
        pipe.unet.set_schedule(None)


def _distances(moments: Mapping[str, FeatureMoments]) -> list[list[float]]:
    missed = Predictors(moments, moments, kinds=())
    calls = missed.calls
    return [missed.reuse_errors(call, calls).sqrt().tolist() for call in range(calls - 1)]


class _Errors:
    """Errors of the calls of cached images, as sums of squares over images.

    Args:
        by_cut: names of each cut's features.
    """

    def __init__(self, by_cut: Mapping[str, Sequence[str]]) -> None:
        self._by_cut = by_cut
        self._cuts: list[str | None] = []
        self._lasts: list[int] = []
        self._sums: list[list[float]] = []
        self._images = 0

    def add(self, recorder: FeatureRecorder, run: Run) -> None:
        """Add the errors of the generation that the recorder watched."""
        if not self._images:
            self._cuts, self._lasts = [None] * len(run.full), list(range(len(run.full)))
            self._sums = [[0.0, 0.0, 0.0, 0.0] for _ in run.full]
        self._images += 1
        last = 0
        for call, (full, cut) in enumerate(zip(run.full, run.cuts, strict=True)):
            sums = self._sums[call]
            if full or cut is None:
                last = call
                sums[3] += 1
                continue
            self._cuts[call], self._lasts[call] = cut, last
            for name in self._by_cut[cut]:
                truth = recorder.computed[name][call]
                sums[0] += float((recorder.computed[name][last] - truth).square().sum())
                sums[1] += float((recorder.read[name][call] - truth).square().sum())
                sums[2] += float(truth.square().sum())

    def calls(self) -> list[Call]:
        """Return each call's errors over all images."""
        made = []
        for cut, last, (reused, read, power, fulls) in zip(self._cuts, self._lasts, self._sums, strict=True):
            of = max(power, 1e-30)
            made.append(
                Call(
                    cut=cut,
                    last=last,
                    reused=math.sqrt(reused / of),
                    read=math.sqrt(read / of),
                    fulls=fulls / self._images,
                )
            )
        return made


def _save(
    folder: Path, images: Sequence[TuningImage], whole: Sequence[Any], cached: Sequence[Any]
) -> tuple[list[Sample], str, float]:
    """Write the first images with their maps, and the mean of all maps; return samples, that file, its maximum."""
    maps = [difference_map(one, other) for one, other in zip(whole, cached, strict=True)]
    most = max(float(each.max()) for each in maps[:SHOWN])
    mean = np.mean(maps, axis=0)
    samples = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images[:SHOWN]):
            kinds = ("uncached", "cached", "changed")
            names = {kind: f"drift-{index}-{kind}.png" for kind in kinds}
            drawn = (_image(whole[index]), _image(cached[index]), coloured(maps[index], most))
            for name, each in zip(names.values(), drawn, strict=True):
                each.save(folder / name)
            samples.append(
                Sample(prompt=image.prompt, seed=image.seed, psnr=finite_psnr(drawn[0], drawn[1]), most=most, **names)
            )
        coloured(mean, float(mean.max())).save(folder / "drift-mean.png")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give another directory with -o") from error
    return samples, "drift-mean.png", float(mean.max())


def difference_map(one: Any, other: Any) -> Any:
    """Return the mean absolute difference [height, width] of two images [height, width, channels] in [0, 1]."""
    return np.asarray(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean(-1))


def coloured(values: Any, most: float) -> PILImage:
    """Return a map as an image, from zero (dark) to ``most`` (light)."""
    from PIL import Image as Pillow

    place = np.clip(values / most if most > 0 else values * 0, 0, 1) * (len(_RAMP) - 1)
    colours = [np.interp(place, range(len(_RAMP)), _RAMP[:, channel]) for channel in range(3)]
    return Pillow.fromarray(np.stack(colours, -1).round().astype(np.uint8))


def _image(values: Any) -> PILImage:
    """Return an image from values [height, width, channels] in [0, 1]."""
    from PIL import Image as Pillow

    return Pillow.fromarray((np.clip(np.asarray(values), 0, 1) * 255).round().astype(np.uint8))
