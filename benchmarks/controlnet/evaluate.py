"""Quality and speed of each setting on the same scenes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..quality import metrics
from ..quality.pictures import Progress
from ..schema.controlnet import ControlNetReuse, ControlNetRow, ReuseChange
from ..shapes import silhouettes
from ..shapes.judge_net.reader import JudgeNet, obeyed
from ..stats import mean_of
from .pipelines import ControlNetMeter, Pipelines, SceneImages, generate_images
from .settings import CUT, UNCACHED, ControlNetSetting, SceneTask

Times = tuple[list[float], list[float]]
"""Seconds per image in each round: of the whole pipeline call, and of the ControlNet."""


@dataclass(frozen=True)
class SceneScores:
    """The scores of a setting, with one value for each scene, (N,)."""

    psnr: metrics.Values
    overlap: metrics.Values
    right: metrics.Values


def evaluate(
    pipes: Pipelines,
    task: SceneTask,
    settings: Sequence[ControlNetSetting],
    *,
    rounds: int,
    model: str,
    controlnet: str,
    on_step: Progress = lambda count: None,
    stage: Callable[[str], None] = lambda text: None,
) -> ControlNetReuse:
    """Generate and score the scenes of all settings, then time a batch of each in turns.

    Args:
        settings: result of ``compared_settings``.
        rounds: number of timing rounds; 0 measures no times.
        model, controlnet: names in the result.
        on_step: called at every denoising step.
        stage: called with the name of each stage.
    """
    images: dict[ControlNetSetting, SceneImages] = {}
    for setting in settings:
        stage(setting.name)
        images[setting] = generate_images(pipes, task, setting, on_step)
    stage("times")
    times = _times(pipes, task, settings, rounds, on_step)
    stage("scores")
    net = JudgeNet.load()
    base = images[UNCACHED].pictures
    scores = {
        setting: SceneScores(
            psnr=metrics.psnr(own.pictures, base),
            overlap=silhouettes.overlaps(own.pictures, task.silhouettes),
            right=obeyed(net, own.pictures, task.prompts),
        )
        for setting, own in images.items()
    }
    return ControlNetReuse(
        model=model,
        controlnet=controlnet,
        engine=pipes.unet.engine,
        scheduler=pipes.scheduler,
        steps=task.steps,
        guidance=task.guidance,
        cut=CUT,
        images=len(task.prompts),
        batch=task.batch,
        rounds=rounds,
        drawn_overlap=float(silhouettes.overlaps(task.drawn, task.silhouettes).mean()),
        rows=[_row(setting, images[setting], scores, times) for setting in settings],
    )


def _times(
    pipes: Pipelines, task: SceneTask, settings: Sequence[ControlNetSetting], rounds: int, on_step: Progress
) -> Mapping[ControlNetSetting, Times]:
    """Time the first batch of scenes with every setting in turn; the first round is not measured."""
    places = range(min(task.batch, len(task.prompts)))
    times: dict[ControlNetSetting, Times] = {setting: ([], []) for setting in settings}
    for turn in range(rounds + 1 if rounds else 0):
        for setting in settings:
            meter = ControlNetMeter()
            began = time.perf_counter()
            pipes.generate(task, setting, places, on_step, meter)
            seconds = time.perf_counter() - began
            if turn:
                times[setting][0].append(seconds / len(places))
                times[setting][1].append(meter.seconds / len(places))
    return times


def _row(
    setting: ControlNetSetting,
    images: SceneImages,
    scores: Mapping[ControlNetSetting, SceneScores],
    times: Mapping[ControlNetSetting, Times],
) -> ControlNetRow:
    own, (seconds, controlnet_seconds) = scores[setting], times[setting]
    cached = setting.interval is not None
    ratios = [one / other for one, other in zip(seconds, times[UNCACHED][0], strict=True)]
    return ControlNetRow(
        name=setting.name,
        control=setting.control,
        interval=setting.interval,
        schedule=None if setting.schedule is None else str(setting.schedule),
        reused=setting.reused,
        full_calls=images.timeline.count("#"),
        shallow_calls=images.timeline.count("."),
        passes=images.passes,
        overlap=mean_of(own.overlap),
        accuracy=mean_of(own.right),
        psnr=mean_of(own.psnr) if cached else None,
        psnr_worst=float(own.psnr.min()) if cached else None,
        change=_change(own, scores[replace(setting, reused=False)]) if setting.reused else None,
        seconds=seconds,
        controlnet_seconds=controlnet_seconds,
        to_uncached=statistics.median(ratios) if ratios else None,
    )


def _change(own: SceneScores, counterpart: SceneScores) -> ReuseChange:
    return ReuseChange(
        psnr=mean_of(own.psnr - counterpart.psnr),
        overlap=mean_of(own.overlap - counterpart.overlap),
        accuracy=mean_of(own.right - counterpart.right),
    )
