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
"""Called with a line of text when a stage or a part of it begins."""


class FeatureRecorder:
    """Records the cached features of a UNet's calls, at randomly chosen positions, generation by generation.

    At a shallow call the recorder also runs the full graph on the same inputs, and records the computed features. It
    then restores the features that the shallow graph reads.

    Args:
        unet: UNet that a pipeline calls inside ``watch``.
        features: names of the cached features.
        positions: largest number of positions of a feature, over all images, to record at each call.
        seed: seed for the choice of positions.
        record_reads: whether to record the features that shallow calls read, too.
        reference: UNet with the same features, which is called with the same inputs. Its features are the true values.

    Attributes:
        computed: for each feature and call of the last generation, the values that the full graph computes:
            [channels, positions], fp32, on the CPU.
        read: values at the same positions that the call read: at a shallow call after the forecast, at a full call
            equal to ``computed``. Empty unless ``record_reads`` is set.
        true: values of the reference at the same positions; empty without a reference.
    """

    def __init__(
        self,
        unet: UNet,
        features: Sequence[str],
        positions: int = 1024,
        seed: int = 0,
        *,
        record_reads: bool = False,
        reference: UNet | None = None,
    ) -> None:
        self._unet, self._features, self._positions = unet, tuple(features), positions
        self._random = torch.Generator().manual_seed(seed)
        self._record_reads, self._reference = record_reads, reference
        self.computed: dict[str, list[torch.Tensor]] = {}
        self.read: dict[str, list[torch.Tensor]] = {}
        self.true: dict[str, list[torch.Tensor]] = {}
        self._sampled: dict[str, torch.Tensor] = {}  # recorded positions, by feature

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Record the generation that runs in this block."""
        self.computed = {name: [] for name in self._features}
        self.read = {name: [] for name in self._features} if self._record_reads else {}
        self.true = {name: [] for name in self._features} if self._reference is not None else {}
        self._sampled = {}
        hook = self._unet.register_forward_hook(self._record_call, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def add_to(self, moments: Mapping[str, FeatureMoments]) -> None:
        """Add the recorded generation to moments: its calls, then the calls of the reference if there is one."""
        for name, feature_moments in moments.items():
            feature_moments.add(torch.stack([*self.computed[name], *self.true.get(name, [])], dim=1))

    def empty_moments(self) -> dict[str, FeatureMoments]:
        """Return moments without values, for generations of the size of the recorded one."""
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
            if self._record_reads:
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
        sets: image sets, to which uncached images are added; latents and feature moments, too, except to the last.
        recorder: records the features of the pipeline's UNet.
        calls: number of UNet calls of a generation, according to the scheduler.
        on_stage: called with lines of progress.
        reference: pipeline that generates the uncached images; None for ``pipeline``.
        tap: tap of the scheduler of the pipeline that generates the uncached images; None to record no latents.

    Raises:
        UserError: the pipeline does not make ``calls`` calls.
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
                images.moments = images.moments or recorder.empty_moments()
                recorder.add_to(images.moments)
            seconds += pipeline.last_run.seconds
    calls_made = len(pipeline.last_run.full)
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
    run = pipeline.last_run
    return statistics.median(seconds for seconds, full in zip(run.seconds, run.full, strict=True) if not full)


def measure_influence(
    pipeline: TuningPipeline,
    select: ImageSet,
    reuse: Mapping[str, Predictors],
    probes: int,
    on_stage: OnStage,
) -> dict[str, Array]:
    """Measure the influence of each call: the change of the final latent relative to the error of the call's features.

    It is measured at a few calls, each in an image where only that call reuses features, and interpolated between
    them.

    Args:
        pipeline: pipeline that is tuned.
        select: selection set.
        reuse: predictors by cut, which give the errors of reuse.
        probes: number of calls to measure.
        on_stage: called with lines of progress.

    Returns:
        Influence of each call, by cut: arrays [calls].
    """
    on_stage("measure each call's influence on the image")
    total = next(iter(reuse.values())).calls
    calls = sorted({round(place) for place in np.linspace(1, total - 1, min(probes, total - 1))})
    images = select.images[:2]
    latent_changes = {cut: np.zeros(len(calls)) for cut in reuse}
    for number, image in enumerate(images):
        uncached = pipeline.generate(image, output="latent").float()
        for cut in reuse:
            suffix = f", {cut}" if len(reuse) > 1 else ""
            for index, call in enumerate(calls):
                on_stage(f"  call {call}, image {number + 1} of {len(images)}{suffix}")
                schedule = Steps([other for other in range(total) if other != call])
                latent = pipeline.generate(image, schedule, cut=cut, output="latent").float()
                latent_changes[cut][index] += float((latent - uncached).norm() / uncached.norm()) / len(images)
    influence = {}
    for cut, predictors in reuse.items():
        errors = [math.sqrt(float(predictors.reuse_errors(call - 1, call + 1)[0])) for call in calls]
        measured = np.maximum(latent_changes[cut], 1e-9) / np.maximum(errors, 1e-9)
        influence[cut] = np.exp(np.interp(np.arange(total), calls, np.log(measured)))
    return influence
