"""Fit of corrections: all images are generated in step, and a kernel is fitted to them at each call.

Each image has a thread. At every step of the scheduler the threads wait for each other. A kernel is then fitted to
their noise predictions, so that the next latents are as close as possible to the uncached ones. The images continue
with the corrected outputs, so the kernels of later calls account for the corrections at earlier calls.

On images that a kernel was fitted to, its error is smaller than on new images. So the images are split into folds
(cross-validation), and each image continues with a kernel that was fitted to the other folds. Its PSNR is that of a new
image, or slightly lower, since the kernel of the schedule is fitted to all folds.
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
"""Sizes of kernels to choose from."""

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Strengths of the ridge penalty to choose from."""

_MAX_ERROR_SHARE = 0.99
"""Largest error on left-out images, as a share of the error without correction, for a kernel to be used."""

_FOLDS = 4
"""Number of groups of images in the cross-validation."""

_POSITIONS_PER_CALL = 2 * 64 * 64
"""Largest number of latent positions in one engine call: one guided image of 512x512, or several smaller images."""

_PATIENCE = 1e-3
"""Seconds that the engines wait for images that run between UNet calls; they do not wait for images at the barrier."""


def fit(
    pipeline: TuningPipeline, tap: SchedulerTap, tuned: Tuned, *sets: ImageSet
) -> tuple[Tuned, tuple[float, ...] | None]:
    """Fit a correction for a schedule.

    Args:
        pipeline: pipeline that is tuned.
        tap: tap of the pipeline's scheduler.
        tuned: the schedule.
        sets: image sets, with their uncached latents.

    Returns:
        The schedule with the correction, or unchanged if no kernel helps. Then the PSNR in dB of each image with
        kernels that were fitted without it; None if no correction can be fitted.
    """
    if not can_fit(tuned.document.key.calls, *sets):
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


def can_fit(calls: int, *sets: ImageSet) -> bool:
    """Return whether kernels can be fitted: it needs images, not videos, and one UNet call for each scheduler step."""
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
    """Barrier where the threads of all images wait at each step while one of them fits the kernels.

    Args:
        tuned: the schedule.
        latents: for each image the uncached latent after each step.

    Attributes:
        full: full calls of the schedule.
        guidance: guidance scale that the correction assumes; None without guidance.
        kernels: fitted kernels by call.
        outside: ``Worker.outside`` of the worker that generates the images; set before the first step.
    """

    def __init__(self, tuned: Tuned, latents: Sequence[Sequence[torch.Tensor]]) -> None:
        low, high = tuned.document.key.guidance
        self.full, self.guidance = tuned.document.full, (low + high) / 2 if low > 1 else None
        self.kernels: dict[int, CallKernels] = {}
        self.outside: Any = None
        self._tuned, self._latents = tuned, latents
        self._barrier = threading.Barrier(len(latents), self._fit)
        self._states: dict[int, _ImageState] = {}  # by thread
        self._samples: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}  # kernel inputs and target, by image
        self._call = 0

    def forecast(self, image: int) -> Forecast:
        """Return the forecast of one image, which records the image's kernel inputs for this barrier."""
        return _WithCorrection(self._tuned.forecast, _InputRecorder(self, image))

    def abort(self) -> None:
        """Raise ``BrokenBarrierError`` in all waiting threads."""
        self._barrier.abort()

    def register(self, state: _ImageState) -> None:
        """Register the state of the image whose thread calls this, after its UNet call."""
        self._states[threading.get_ident()] = state

    def step(self, step: SchedulerStep, output: torch.Tensor) -> torch.Tensor:
        """Return the corrected output for the image whose thread calls this, before its scheduler makes the step."""
        state = self._states[threading.get_ident()]
        sample = None
        if state.kernel_inputs is not None:
            target = step.output_for(self._latents[state.image][self._call])
            sample = None if target is None else (state.kernel_inputs, target - output.float())
        self._samples[state.image] = sample
        with self.outside():
            self._barrier.wait()
        kernels = self.kernels.get(self._call - 1)
        change = None
        if state.kernel_inputs is not None:
            change = None if kernels is None else kernels.without(state.image)(state.kernel_inputs)
            state.record(change)
        return output if change is None else output + change.to(output.dtype)

    def _fit(self) -> None:
        """Fit the kernels of this call; runs in one thread while the others wait."""
        call, self._call = self._call, self._call + 1
        samples = [self._samples[image] for image in range(len(self._latents))]
        known = [sample for sample in samples if sample is not None]
        if call > 0 and len(known) == len(samples):  # the first call reads no cached features
            kernels = best_kernels(known)
            if kernels is not None:
                self.kernels[call] = kernels


class _ImageState(CorrectionState):
    """State of one image: holds the kernel inputs from its UNet call until its scheduler makes the step."""

    def __init__(self, barrier: StepBarrier, image: int) -> None:
        super().__init__(barrier.full, barrier.guidance, {})
        self.image, self._barrier = image, barrier
        self.kernel_inputs: torch.Tensor | None = None

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        self.kernel_inputs = self.inputs(full, sample, noise_pred)
        self._barrier.register(self)
        return noise_pred


@dataclass(frozen=True)
class _InputRecorder(Correction):
    """Correction that changes nothing, and records the kernel inputs of one image."""

    barrier: StepBarrier
    image: int

    def begin(self) -> CorrectionState:
        return _ImageState(self.barrier, self.image)


@dataclass(frozen=True)
class _WithCorrection(Forecast):
    """Another forecast's coefficients together with a correction."""

    other: Forecast | None
    correction: Correction | None

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return None if self.other is None else self.other.at(feature, call, last, before)


@dataclass(frozen=True)
class CallKernels:
    """Kernels of one call, all with the same size and ridge penalty.

    Attributes:
        kernel: kernel fitted to all images.
        by_fold: for each fold, the kernel fitted to the images of the other folds.
    """

    kernel: Kernel
    by_fold: tuple[Kernel, ...]

    def without(self, image: int) -> Kernel:
        """Return the kernel that was fitted without this image."""
        return self.by_fold[image % len(self.by_fold)]


def best_kernels(samples: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> CallKernels | None:
    """Fit kernels with the size and ridge penalty that have the smallest error on left-out images.

    Args:
        samples: for each image the kernel inputs [1, inputs, height, width] and the target [1, channels, height,
            width].

    Returns:
        The kernels; None if no kernel is sufficiently better than no correction.
    """
    channels = samples[0][1].shape[1]
    if len(samples) == 1:
        return None  # no image is left out
    folds = [sum(map(_products, samples[first::_FOLDS]), _ZERO) for first in range(min(_FOLDS, len(samples)))]
    total = sum(folds, _ZERO)
    patches = len(total) - channels - 1
    best, smallest = None, _MAX_ERROR_SHARE * float(total[patches:-1, patches:-1].trace())
    for size in SIZES:
        # Rows of all 9 positions of a patch or of its centre only, and the rows after the patches.
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
    """Return the kernel with the weights and bias that ``_ridge`` returned."""
    weight = solution[:-1].T.reshape(solution.shape[1], -1, size, size)
    return Kernel(weight.float().contiguous(), solution[-1].float())


_ZERO = torch.zeros((), dtype=torch.float64)


def _squared_error(solution: torch.Tensor, products: torch.Tensor) -> float:
    """Return the sum of squared errors of a solution of ``_ridge``, on the images whose products are given."""
    residual = torch.cat([-solution[:-1], torch.eye(solution.shape[1], dtype=torch.float64), -solution[-1:]])
    return float((residual * (products @ residual)).sum())


def _ridge(products: torch.Tensor, channels: int, strength: float) -> torch.Tensor:
    """Solve the ridge regression from sums of ``_products``: [inputs + 1, channels], the bias in the last row."""
    count, inputs = products[-1, -1], len(products) - channels - 1
    means = products[-1] / count
    centred = products - count * means[:, None] * means
    gram = centred[:inputs, :inputs]
    penalty = strength * gram.diagonal() + 1e-12 * gram.diagonal().max().clamp(min=1e-12)
    weights = torch.linalg.solve(gram + torch.diag(penalty), centred[:inputs, inputs:-1])
    return torch.cat([weights, (means[inputs:-1] - means[:inputs] @ weights)[None]])


def _products(sample: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return one image's Gram matrix; its columns are the inputs' 3x3 patches, the target's channels, and ones."""
    inputs, targets = sample
    patches = torch.nn.functional.unfold(inputs.cpu(), 3, padding=1)[0].T
    columns = torch.cat([patches, targets.cpu().flatten(2)[0].T, torch.ones(len(patches), 1)], 1).double()
    return columns.T @ columns
