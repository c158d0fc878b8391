"""Measurements before the search: features of uncached images, the engine's times, and the influence of each call."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch

from ...errors import UserError
from ..generation.schedule import Steps, Uniform
from ..unet import UNet
from .images import ImageSet, TuningPipeline
from .prediction import FeatureMoments, Predictors
from .scheduler_tap import SchedulerTap
from .search import Array, CallCosts

OnStage = Callable[[str], None]
"""Called with a line of text when a stage of the work begins."""


class FeatureRecorder:
    """Records the cached features of a UNet's calls at a sample of positions, one generation after another.

    At a shallow call the recorded feature is the one that the full graph computes from the same inputs: the recorder
    runs the full graph as well, and then restores what the shallow graph reads.

    Args:
        unet: UNet that a pipeline calls inside ``watch``.
        features: names of the cached features.
        positions: number of positions of a feature, over all images, to record at each call; all if it has no more.
        seed: seed of the sample of positions.
        reads: whether to record what shallow calls read as well.
        reference: UNet with the same features, which is called with the same inputs, and whose features count as true.

    Attributes:
        computed: for each feature and call the values of the last generation, as the full graph computes them:
            [channels, positions], fp32, on the CPU.
        read: at the same positions the values that the call read: on a shallow call as a forecast left them, on a full
            call equal to ``computed``; empty unless ``reads`` is set.
        true: at the same positions the values of the reference; empty without one.
    """

    def __init__(
        self,
        unet: UNet,
        features: Sequence[str],
        positions: int = 1024,
        seed: int = 0,
        *,
        reads: bool = False,
        reference: UNet | None = None,
    ) -> None:
        self._unet, self._features, self._positions = unet, tuple(features), positions
        self._random = torch.Generator().manual_seed(seed)
        self._reads, self._reference = reads, reference
        self.computed: dict[str, list[torch.Tensor]] = {}
        self.read: dict[str, list[torch.Tensor]] = {}
        self.true: dict[str, list[torch.Tensor]] = {}
        self._sampled: dict[str, torch.Tensor] = {}  # positions by feature

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the generation that runs in this block."""
        self.computed = {name: [] for name in self._features}
        self.read = {name: [] for name in self._features} if self._reads else {}
        self.true = {name: [] for name in self._features} if self._reference is not None else {}
        self._sampled = {}
        hook = self._unet.register_forward_hook(self._record_call, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def add_to(self, moments: Mapping[str, FeatureMoments]) -> None:
        """Add the recorded generation: its calls, followed by those of the reference if there is one."""
        for name, of_feature in moments.items():
            of_feature.add(torch.stack([*self.computed[name], *self.true.get(name, [])], dim=1))

    def empty(self) -> dict[str, FeatureMoments]:
        """Return empty moments of the size of the recorded generation."""
        return {
            name: FeatureMoments(len(values) + len(self.true.get(name, [])), len(values[0]))
            for name, values in self.computed.items()
        }

    def _record_call(self, module: Any, arguments: Any, named: Any, output: Any) -> None:
        bound, run = self._unet.bound, self._unet.last_run
        assert bound is not None
        assert run is not None
        shallow = not run.full[-1]
        read = {name: bound.buffers[name].clone() for name in self._features} if shallow else {}
        if shallow:
            bound.full()
        for name in self._features:
            values = bound.buffers[name].movedim(1, 0).flatten(1)
            if name not in self._sampled:
                sample = torch.randperm(values.shape[1], generator=self._random)[: self._positions]
                self._sampled[name] = sample.sort().values.to(values.device)
            self.computed[name].append(values[:, self._sampled[name]].float().cpu())
            if self._reads:
                read_values = read[name].movedim(1, 0).flatten(1) if shallow else values
                self.read[name].append(read_values[:, self._sampled[name]].float().cpu())
        for name, values in read.items():
            bound.buffers[name].copy_(values)
        if self._reference is None:
            return
        with torch.no_grad():
            self._reference(*arguments, **named)
        reference_bound = self._reference.bound
        assert reference_bound is not None
        for name in self._features:
            values = reference_bound.buffers[name].to(bound.buffers[name].device).movedim(1, 0).flatten(1)
            self.true[name].append(values[:, self._sampled[name]].float().cpu())


def record(
    pipeline: TuningPipeline,
    sets: Sequence[ImageSet],
    recorder: FeatureRecorder,
    calls: int,
    on_stage: OnStage,
    reference: TuningPipeline | None = None,
    tap: SchedulerTap | None = None,
) -> CallCosts:
    """Generate the uncached images, record their features, and time the engine's calls.

    Args:
        pipeline: pipeline that is tuned.
        sets: image sets, which get uncached images. All but the last one get latents and feature moments, too.
        recorder: records the features of the pipeline's UNet.
        calls: number of UNet calls that the scheduler makes.
        on_stage: called with the progress.
        reference: generates the uncached images; None for the pipeline itself.
        tap: tap of the scheduler of the pipeline that generates the uncached images; None to record no latents.

    Raises:
        UserError: the pipeline makes another number of calls.
    """
    done, total = 0, sum(len(images.images) for images in sets)
    seconds: list[float] = []
    on_stage("generate uncached images")
    for images in sets:
        for image in images.images:
            done += 1
            on_stage(f"  {done} of {total}")
            tapped: AbstractContextManager[list[torch.Tensor]] = nullcontext([]) if tap is None else tap.latents()
            if reference is None:
                with recorder.watch(), tapped as latents:
                    pixels = pipeline.generate(image)
            else:
                with recorder.watch():
                    pipeline.generate(image)
                with tapped as latents:
                    pixels = reference.generate(image)
            images.uncached.append(pixels)
            if images is not sets[-1]:
                images.latents.append(latents)
                images.moments = images.moments or recorder.empty()
                recorder.add_to(images.moments)
            seconds += pipeline.run.seconds
    calls_made = len(pipeline.run.full)
    if calls_made != calls:
        raise UserError(
            f"{type(pipeline.pipe).__name__} calls its UNet {calls_made} times in {pipeline.steps} steps, not "
            f"{calls} times as its scheduler says: this pipeline cannot be tuned"
        )
    full_seconds = statistics.median(seconds)
    ratios = {cut: _shallow_seconds(pipeline, sets[1], cut) / full_seconds for cut in pipeline.cuts}
    return CallCosts(calls, ratios, full_seconds)


def _shallow_seconds(pipeline: TuningPipeline, select: ImageSet, cut: str) -> float:
    """Return the duration of a shallow call at this cut, from one cached image."""
    pipeline.generate(select.images[0], Uniform(2), cut=cut)
    run = pipeline.run
    return statistics.median(seconds for seconds, full in zip(run.seconds, run.full, strict=True) if not full)


def measure_influence(
    pipeline: TuningPipeline,
    select: ImageSet,
    reuse: Mapping[str, Predictors],
    probes: int,
    on_stage: OnStage,
) -> dict[str, Array]:
    """Measure how far an error of a cut's features moves the final latent, relative to their size, at each call.

    It is measured at a few calls, each in an image where only that call reuses features. The other calls are
    interpolated.

    Args:
        pipeline: pipeline that is tuned.
        select: selection set.
        reuse: predictors by cut, which know the errors of reuse.
        probes: number of calls to measure.
        on_stage: called with the progress.

    Returns:
        For each cut an array [calls].
    """
    on_stage("measure each call's influence on the image")
    total = next(iter(reuse.values())).calls
    calls = sorted({round(place) for place in np.linspace(1, total - 1, min(probes, total - 1))})
    images = select.images[:2]
    moved = {cut: np.zeros(len(calls)) for cut in reuse}
    for number, image in enumerate(images):
        uncached = pipeline.generate(image, output="latent").float()
        for cut in reuse:
            suffix = f", {cut}" if len(reuse) > 1 else ""
            for index, call in enumerate(calls):
                on_stage(f"  call {call}, image {number + 1} of {len(images)}{suffix}")
                schedule = Steps([other for other in range(total) if other != call])
                latent = pipeline.generate(image, schedule, cut=cut, output="latent").float()
                moved[cut][index] += float((latent - uncached).norm() / uncached.norm()) / len(images)
    influence = {}
    for cut, predictors in reuse.items():
        errors = [math.sqrt(float(predictors.reuse_errors(call - 1, call + 1)[0])) for call in calls]
        measured = np.maximum(moved[cut], 1e-9) / np.maximum(errors, 1e-9)
        influence[cut] = np.exp(np.interp(np.arange(total), calls, np.log(measured)))
    return influence
