"""Fit of corrections: all images go through the sampler side by side, and at each call a kernel is fitted to them.

Each image has a thread. At every step of the scheduler the threads wait for each other. From their noise predictions
follows the kernel that brings all images as close as possible to their uncached latents, and with this kernel the
images go on. So the kernels of later calls account for the corrections at earlier calls.

An image that a kernel was fitted to says nothing about other images. So the images are split into folds, and each image
goes on with a kernel that was fitted without its fold. Its PSNR is then that of a new image, or a little lower, as the
kernels that are kept were fitted to one more fold.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from typing import Any

import torch

from ..batching import Ticket, Worker
from ..generation.correction import Convolutions, Correction, CorrectionState, Kernel
from ..generation.forecast import Coefficients, Forecast
from ..images.metrics import finite_psnr
from ..text_to_image import prompt_arguments
from .artifact import Tuned
from .images import ImageSet, TuningImage, TuningPipeline
from .scheduler_tap import SchedulerStep, SchedulerTap

SIZES = (1, 3)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_GAIN = 0.99
"""Largest share of the error of left-out images that a useful kernel leaves."""

_FOLDS = 4

_POSITIONS_PER_CALL = 2 * 64 * 64
"""Limit of latent positions in one engine call: those of a guided image of 512x512. Smaller images share calls."""

_PATIENCE = 1e-3
"""Seconds that the engines wait for images that may be on their way; images at the barrier are not."""


def fit(
    pipeline: TuningPipeline, tap: SchedulerTap, tuned: Tuned, *sets: ImageSet
) -> tuple[Tuned, tuple[float, ...] | None]:
    """Fit a correction for a schedule.

    Args:
        pipeline: pipeline that is tuned.
        tap: tap of its scheduler.
        tuned: the schedule.
        sets: images, with their uncached latents.

    Returns:
        The schedule with the correction, or unchanged if no kernel helps; and the PSNR in dB of each image with kernels
        that were fitted without it, or None if no correction is possible.
    """
    if not possible(tuned.document.key.calls, *sets):
        return tuned, None
    images = [image for images in sets for image in images.images]
    latents = [latent for images in sets for latent in images.latents]
    barrier = StepBarrier(tuned, latents)
    worker = Worker(
        pipeline.pipe,
        max_in_flight=len(images),
        max_queue=0,
        max_batch=max(2, _POSITIONS_PER_CALL // (latents[0][0].shape[-1] * latents[0][0].shape[-2])),
        bound_shapes=2,
        patience=_PATIENCE,
        cache_bytes=2**62,
    )
    tap.replace_output = barrier.step
    try:
        with worker:
            barrier.outside = worker.outside
            tickets = [
                _submit(worker, pipeline, tuned, image, barrier.forecast(index)) for index, image in enumerate(images)
            ]
            done, _ = wait([ticket.future for ticket in tickets], return_when=FIRST_EXCEPTION)
            if any(future.exception() for future in done):
                barrier.abort()
            wait([ticket.future for ticket in tickets])
        errors = [error for ticket in tickets if (error := ticket.future.exception()) is not None]
        causes = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (causes or errors)[0]
    finally:
        tap.replace_output = None
    pixels = [ticket.future.result().images[0] for ticket in tickets]
    uncached = [image for images in sets for image in images.uncached]
    psnrs = tuple(finite_psnr(*pair, peak=1.0) for pair in zip(pixels, uncached, strict=True))
    if not barrier.kernels:
        return tuned, psnrs
    kernels = {call: fitted.kernel for call, fitted in barrier.kernels.items()}
    return tuned.with_correction(Convolutions(kernels, barrier.full, barrier.guidance)), psnrs


def possible(calls: int, *sets: ImageSet) -> bool:
    """Return whether kernels can be fitted: not if the scheduler's steps differ from the calls, nor for videos."""
    return all(len(latents) == calls and latents[0].dim() == 4 for images in sets for latents in images.latents)


def _submit(worker: Worker, pipeline: TuningPipeline, tuned: Tuned, image: TuningImage, forecast: Forecast) -> Ticket:
    arguments = prompt_arguments(
        pipeline.pipe,
        image.prompt,
        steps=pipeline.steps,
        guidance=image.guidance,
        seed=image.seed,
        size=pipeline.size,
        output="np",
    )
    return worker.submit(arguments, schedule=tuned.schedule, cut=tuned.document.cut, forecast=forecast)


class StepBarrier:
    """Barrier at which the threads of all images wait at each step, and at which the kernels are fitted.

    Args:
        tuned: the schedule.
        latents: for each image the uncached latent after each step.

    Attributes:
        full: full calls of the schedule.
        guidance: guidance scale that the correction assumes; None without guidance.
        kernels: fitted kernels by call.
        outside: ``Worker.outside`` of the worker that runs the images.
    """

    def __init__(self, tuned: Tuned, latents: Sequence[Sequence[torch.Tensor]]) -> None:
        low, high = tuned.document.key.guidance
        self.full, self.guidance = tuned.document.full, (low + high) / 2 if low > 1 else None
        self.kernels: dict[int, CallKernels] = {}
        self.outside: Any = None
        self._tuned, self._latents = tuned, latents
        self._barrier = threading.Barrier(len(latents), self._fit)
        self._inputs: dict[int, _KernelInputs] = {}  # by thread
        self._samples: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}  # kernel inputs and targets, by image
        self._call = 0

    def forecast(self, image: int) -> Forecast:
        """Return the forecast of one image, which lets the barrier see its noise predictions."""
        return _WithCorrection(self._tuned.forecast, _RecordInputs(self, image))

    def abort(self) -> None:
        """End the waiting of all threads with an error."""
        self._barrier.abort()

    def register(self, inputs: _KernelInputs) -> None:
        """Register the kernel inputs of an image, in its thread, after its UNet was called."""
        self._inputs[threading.get_ident()] = inputs

    def step(self, step: SchedulerStep, output: torch.Tensor) -> torch.Tensor:
        """Return the corrected output, in an image's thread, when its scheduler is about to make a step."""
        inputs = self._inputs[threading.get_ident()]
        sample = None
        if inputs.seen is not None:
            target = step.output_towards(self._latents[inputs.image][self._call])
            sample = None if target is None else (inputs.seen, target - output.float())
        self._samples[inputs.image] = sample
        with self.outside():
            self._barrier.wait()
        kernels = self.kernels.get(self._call - 1)
        change = None if kernels is None or inputs.seen is None else kernels.without(inputs.image)(inputs.seen)
        if inputs.seen is not None:
            inputs.record(change)
        return output if change is None else output + change.to(output.dtype)

    def _fit(self) -> None:
        """Fit the kernels of this call, in one of the threads while the others wait."""
        call, self._call = self._call, self._call + 1
        samples = [self._samples[image] for image in range(len(self._latents))]
        known = [sample for sample in samples if sample is not None]
        if call > 0 and len(known) == len(samples):  # the first call reads no cached features
            kernels = best_kernels(known)
            if kernels is not None:
                self.kernels[call] = kernels


class _KernelInputs(CorrectionState):
    """Inputs of the kernels for one image, kept from its UNet call until its scheduler makes the step."""

    def __init__(self, barrier: StepBarrier, image: int) -> None:
        super().__init__(barrier.full, barrier.guidance, {})
        self.image, self._barrier = image, barrier
        self.seen: torch.Tensor | None = None

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        self.seen = self.inputs(full, sample, noise_pred)
        self._barrier.register(self)
        return noise_pred


@dataclass(frozen=True)
class _RecordInputs(Correction):
    """Correction that changes nothing, and records the kernel inputs of one image."""

    barrier: StepBarrier
    image: int

    def begin(self) -> CorrectionState:
        return _KernelInputs(self.barrier, self.image)


@dataclass(frozen=True)
class _WithCorrection(Forecast):
    """Another forecast with this correction."""

    other: Forecast | None
    correction: Correction | None

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return None if self.other is None else self.other.at(feature, call, last, before)


@dataclass(frozen=True)
class CallKernels:
    """Kernels of one call, all of the same size and ridge.

    Attributes:
        kernel: kernel fitted to all images.
        by_fold: for each fold, the kernel fitted to the images of the other folds.
    """

    kernel: Kernel
    by_fold: tuple[Kernel, ...]

    def without(self, image: int) -> Kernel:
        """Return the kernel that was fitted without an image."""
        return self.by_fold[image % len(self.by_fold)]


def best_kernels(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> CallKernels | None:
    """Fit kernels of the size and ridge with the smallest error on left-out images.

    Args:
        samples: for each image the inputs of a kernel [1, inputs, height, width] and its target [1, channels, height,
            width].

    Returns:
        The kernels; None if no kernel is better than no correction.
    """
    channels = samples[0][1].shape[1]
    if len(samples) == 1:
        return None  # there is no image to judge a kernel on
    folds = [sum(map(_products, samples[first::_FOLDS]), _ZERO) for first in range(min(_FOLDS, len(samples)))]
    total = sum(folds, _ZERO)
    patches = len(total) - channels - 1
    best, smallest = None, _GAIN * float(total[patches:-1, patches:-1].trace())
    for size in SIZES:
        # Of the 9 places of a patch, all or the one in the middle; and the rows behind the patches.
        rows = torch.arange(patches)[:: 1 if size == 3 else 9] + (0 if size == 3 else 4)
        rows = torch.cat([rows, torch.arange(patches, len(total))])
        fold_products = [fold[rows][:, rows] for fold in folds]
        all_products = total[rows][:, rows]
        for ridge in RIDGES:
            solutions = [_ridge(all_products - fold, channels, ridge) for fold in fold_products]
            error = sum(map(_squared_error, solutions, fold_products))
            if error < smallest:
                kernel, *by_fold = [
                    _kernel(solution, size) for solution in (_ridge(all_products, channels, ridge), *solutions)
                ]
                best, smallest = CallKernels(kernel, tuple(by_fold)), error
    return best


def _kernel(solution: torch.Tensor, size: int) -> Kernel:
    """Return the kernel of a solution of ``_ridge``."""
    weight = solution[:-1].T.reshape(solution.shape[1], -1, size, size)
    return Kernel(weight.float().contiguous(), solution[-1].float())


_ZERO = torch.zeros((), dtype=torch.float64)


def _squared_error(solution: torch.Tensor, products: torch.Tensor) -> float:
    """Return the sum of squared errors of a solution of ``_ridge`` on the images with these products."""
    residual = torch.cat([-solution[:-1], torch.eye(solution.shape[1], dtype=torch.float64), -solution[-1:]])
    return float((residual * (products @ residual)).sum())


def _ridge(products: torch.Tensor, channels: int, strength: float) -> torch.Tensor:
    """Return weights and, in the last row, bias [inputs + 1, channels] from ``_products`` of inputs, targets and 1."""
    count, inputs = products[-1, -1], len(products) - channels - 1
    means = products[-1] / count
    centred = products - count * means[:, None] * means
    own = centred[:inputs, :inputs]
    penalty = strength * own.diagonal() + 1e-12 * own.diagonal().max().clamp(min=1e-12)
    weights = torch.linalg.solve(own + torch.diag(penalty), centred[:inputs, inputs:-1])
    return torch.cat([weights, (means[inputs:-1] - means[:inputs] @ weights)[None]])


def _products(sample: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return, for one image, the sums of products of the 3x3 patches of the inputs, the targets, and 1."""
    inputs, targets = sample
    patches = torch.nn.functional.unfold(inputs.cpu(), 3, padding=1)[0].T
    columns = torch.cat([patches, targets.cpu().flatten(2)[0].T, torch.ones(len(patches), 1)], 1).double()
    return columns.T @ columns
