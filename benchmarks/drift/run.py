"""The measurement: uncached images, the same with the schedule, and walks along the start noise with both."""

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
from ..schema.drift import Call, Drift, Sample, Walk
from .maps import changed, painted, picture
from .walk import walk

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

SHOWN = 4
"""Images that are kept."""


@dataclass(frozen=True)
class DriftRequest:
    """What to measure.

    Attributes:
        schedule: to measure.
        cut: of its shallow calls to which it gives none of their own; None for the bundle's first.
        forecast: as ``UNet.set_schedule`` takes it.
        steps: of the pipeline's scheduler.
        guidance: scale.
        prompts: drawn in turn.
        images: in all; image i from seed ``seed + i``.
        size: height and width in pixels; None is the model's own.
        walks: interpolations of the start noise, each drawn uncached and cached; 0 for none.
        points: images of a walk.
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
    walks: int = 2
    points: int = 9
    positions: int = 1024


def drift(
    pipe: Any, bundle: Bundle, precision: str, wanted: DriftRequest, folder: Path, stage: Callable[[str], None]
) -> Drift:
    """Measure a pipeline of ``offcut.load`` with its present scheduler.

    Args:
        bundle: that the pipeline was loaded from.
        precision: of its engine, as it is to be named.
        folder: gets the samples.

    Raises:
        UserError: the pipeline draws from more than a prompt, or the folder cannot be written.
    """
    if not is_text_to_image(pipe.__call__):
        raise UserError(f"{type(pipe).__name__} draws from more than a prompt, and this draws from prompts only")
    unet = pipe.unet
    unet.set_schedule(wanted.schedule, wanted.cut, wanted.forecast)
    cut, names = unet.cut, unet.scheduled_features
    by_cut = {each: unet.cut_features.get(each, ()) for each in unet.scheduled_cuts}
    if not names:
        raise UserError(
            "no call of this schedule reads cached features, and this watches them: give one with shallow calls"
        )
    pipeline = TuningPipeline(pipe, wanted.steps, wanted.size, {cut: unet.cut_features[cut]} | by_cut)
    images = [
        TuningImage(wanted.prompts[index % len(wanted.prompts)], wanted.seed + index, wanted.guidance)
        for index in range(wanted.images)
    ]
    with _quietly(pipe):
        recorder = FeatureRecorder(unet, names, wanted.positions, wanted.seed, reads=True)
        moments: dict[str, FeatureMoments] = {}
        whole = []
        stage("draw uncached images")
        for image in images:
            with recorder.watch():
                whole.append(pipeline.generate(image))
            moments = moments or recorder.empty()
            recorder.add_to(moments)
        stage("draw them with the schedule")
        errors, cached = _Errors(by_cut), []
        for image in images:
            with recorder.watch():
                cached.append(pipeline.generate(image, wanted.schedule, wanted.forecast, cut=cut))
            errors.add(recorder, pipeline.run)
        stage("walk along the start noise")
        walks = [_walks(pipe, wanted, cut, cached=each) for each in (False, True)]
    samples, name, most = _save(folder, images, whole, cached)
    return Drift(
        model=model_name(bundle),
        engine=unet.engine,
        precision=precision,
        scheduler=type(pipe.scheduler).__name__,
        steps=wanted.steps,
        guidance=wanted.guidance,
        schedule=str(wanted.schedule) if wanted.schedule.kind != "tuned" else "tuned",
        forecast=None if wanted.forecast is None else str(wanted.forecast),
        features=list(names),
        images=len(images),
        distances=_distances(moments),
        calls=errors.calls(),
        samples=samples,
        mean_changed=name,
        mean_most=most,
        uncached_walks=walks[0],
        cached_walks=walks[1],
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
    """What the calls of cached images missed; sums of squares over images.

    Args:
        by_cut: the features of each cut.
    """

    def __init__(self, by_cut: Mapping[str, Sequence[str]]) -> None:
        self._by_cut = by_cut
        self._cuts: list[str | None] = []
        self._lasts: list[int] = []
        self._sums: list[list[float]] = []
        self._images = 0

    def add(self, recorder: FeatureRecorder, run: Run) -> None:
        """The generation that was watched."""
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
                truth = recorder.kept[name][call]
                sums[0] += float((recorder.kept[name][last] - truth).square().sum())
                sums[1] += float((recorder.read[name][call] - truth).square().sum())
                sums[2] += float(truth.square().sum())

    def calls(self) -> list[Call]:
        """Of all images."""
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


def _walks(pipe: Any, wanted: DriftRequest, cut: str, *, cached: bool) -> list[Walk]:
    schedule = wanted.schedule if cached else None
    pipe.unet.set_schedule(schedule, cut if cached else None, wanted.forecast if cached else None)
    return [
        walk(
            pipe,
            wanted.prompts[index % len(wanted.prompts)],
            (wanted.seed + 2 * index, wanted.seed + 2 * index + 1),
            wanted.points,
            steps=wanted.steps,
            guidance=wanted.guidance,
            size=wanted.size,
        )
        for index in range(wanted.walks)
    ]


def _save(
    folder: Path, images: Sequence[TuningImage], whole: Sequence[Any], cached: Sequence[Any]
) -> tuple[list[Sample], str, float]:
    """Write the first images with their maps, and the map of all."""
    maps = [changed(one, other) for one, other in zip(whole, cached, strict=True)]
    most = max(float(each.max()) for each in maps[:SHOWN])
    mean = np.mean(maps, axis=0)
    samples = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in enumerate(images[:SHOWN]):
            kinds = ("uncached", "cached", "changed")
            names = {kind: f"drift-{index}-{kind}.png" for kind in kinds}
            drawn = (picture(whole[index]), picture(cached[index]), painted(maps[index], most))
            for name, each in zip(names.values(), drawn, strict=True):
                each.save(folder / name)
            samples.append(
                Sample(prompt=image.prompt, seed=image.seed, psnr=finite_psnr(drawn[0], drawn[1]), most=most, **names)
            )
        painted(mean, float(mean.max())).save(folder / "drift-mean.png")
    except OSError as error:
        raise UserError(f"cannot write into {folder}: {error.strerror}; give another directory with -o") from error
    return samples, "drift-mean.png", float(mean.max())
