"""Fitting corrections: all images go through the sampler side by side, and at each call a kernel is fitted to them.

Each image has a thread. At every step of the scheduler the threads meet; from what they were asked and answered follows
the kernel that takes all of them as near as can be to where they are without caching, and with it they go on. So the
kernels of later calls know what those before have mended.

An image that a kernel was fitted to tells nothing of others. So images are dealt into parts, and each goes on by a
kernel that was fitted without its part: how near it comes is how near a new image would come, or a little less, as one
part more knows the kernels that are kept.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, wait
from dataclasses import dataclass
from typing import Any

import torch

from ..batching import Worker
from ..batching.request import Ticket
from ..generation.correction import Convolutions, Correction, CorrectionState, Kernel
from ..generation.forecast import Coefficients, Forecast
from ..images.metrics import finite_psnr
from ..text_to_image import prompt_arguments
from .artifact import Tuned
from .images import Image, ImageSet, Studio
from .watched import At, Watch

SIZES = (1, 3)
RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_GAIN = 0.99
"""A kernel must leave less than this share of the error of images that it was not fitted to."""

_PARTS = 4
"""Into so many parts the images are dealt."""

_TOGETHER = 2 * 64 * 64
"""Positions of the latents in one engine call: those of a guided image of 512x512. Smaller ones share calls."""

_PATIENCE = 1e-3
"""Seconds that the engines wait for images that may be on their way; those that wait to meet others are not."""


def fit(studio: Studio, watch: Watch, tuned: Tuned, *sets: ImageSet) -> tuple[Tuned, tuple[float, ...] | None]:
    """The schedule with a correction; without, where none helps or can be.

    Args:
        watch: of the studio's pipeline.
        sets: images, with their latents.

    Returns:
        The schedule, and the PSNR of each image with kernels that know nothing of it, in dB; None where no correction
        can be.
    """
    if not possible(tuned.document.key.calls, *sets):
        return tuned, None
    images = [image for each in sets for image in each.images]
    latents = [latent for each in sets for latent in each.latents]
    meeting = _Meeting(tuned, latents)
    worker = Worker(
        studio.pipe,
        max_in_flight=len(images),
        max_queue=0,
        max_batch=max(2, _TOGETHER // (latents[0][0].shape[-1] * latents[0][0].shape[-2])),
        bound_shapes=2,
        patience=_PATIENCE,
        cache_bytes=2**62,
    )
    watch.ask = meeting.step
    try:
        with worker:
            meeting.outside = worker.outside
            tickets = [_send(worker, studio, tuned, image, meeting.part(place)) for place, image in enumerate(images)]
            done, _ = wait([each.future for each in tickets], return_when=FIRST_EXCEPTION)
            if any(each.exception() for each in done):
                meeting.barrier.abort()
            wait([each.future for each in tickets])
        errors = [error for each in tickets if (error := each.future.exception()) is not None]
        whys = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)]
        if errors:
            raise (whys or errors)[0]
    finally:
        watch.ask = None
    pictures = [each.future.result().images[0] for each in tickets]
    uncached = [picture for each in sets for picture in each.pictures]
    near = tuple(finite_psnr(*pair, peak=1.0) for pair in zip(pictures, uncached, strict=True))
    if not meeting.kernels:
        return tuned, near
    kernels = {call: each.kernel for call, each in meeting.kernels.items()}
    return tuned.with_correction(Convolutions(kernels, meeting.full, meeting.guidance)), near


def possible(calls: int, *sets: ImageSet) -> bool:
    """Whether kernels can be fitted to these: not where the scheduler has other steps than calls, nor to videos."""
    return all(len(each) == calls and each[0].dim() == 4 for one in sets for each in one.latents)


def _send(worker: Worker, studio: Studio, tuned: Tuned, image: Image, forecast: Forecast) -> Ticket:
    arguments = prompt_arguments(
        studio.pipe,
        image.prompt,
        steps=studio.steps,
        guidance=image.guidance,
        seed=image.seed,
        size=studio.size,
        output="np",
    )
    return worker.submit(arguments, schedule=tuned.schedule, cut=tuned.document.cut, forecast=forecast)


class _Meeting:
    """Where the images' threads meet at each step."""

    def __init__(self, tuned: Tuned, latents: Sequence[Sequence[torch.Tensor]]) -> None:
        low, high = tuned.document.key.guidance
        self.full, self.guidance = tuned.document.full, (low + high) / 2 if low > 1 else None
        self.kernels: dict[int, Kernels] = {}
        self.barrier = threading.Barrier(len(latents), self._fit)
        self.outside: Any = None
        self._tuned, self._latents = tuned, latents
        self._parts: dict[int, _Part] = {}  # by thread
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor] | None] = {}  # by image
        self._call = 0

    def part(self, place: int) -> Forecast:
        """What stands for the forecast of one image."""
        return _Predicts(self._tuned.forecast, _Asks(self, place))

    def present(self, part: _Part) -> None:
        """In an image's thread, when its UNet was called."""
        self._parts[threading.get_ident()] = part

    def step(self, at: At, output: torch.Tensor) -> torch.Tensor:
        """In an image's thread, as its scheduler is about to make a step."""
        part = self._parts[threading.get_ident()]
        wanted = None
        if part.seen is not None:
            wanted = at.towards(self._latents[part.place][self._call])
        self._seen[part.place] = None if wanted is None or part.seen is None else (part.seen, wanted - output.float())
        with self.outside():
            self.barrier.wait()
        kernels = self.kernels.get(self._call - 1)
        change = None if kernels is None or part.seen is None else kernels.of(part.place)(part.seen)
        if part.seen is not None:
            part.keep(change)
        return output if change is None else output + change.to(output.dtype)

    def _fit(self) -> None:
        """In one of the threads, while the others wait."""
        call, self._call = self._call, self._call + 1
        seen = [self._seen[place] for place in range(len(self._latents))]
        known = [each for each in seen if each is not None]
        if call > 0 and len(known) == len(seen):  # at the first call nothing was cached
            kernels = best_kernels(known)
            if kernels is not None:
                self.kernels[call] = kernels


class _Part(CorrectionState):
    """One image's calls: what a kernel will see of each, kept until its scheduler steps."""

    def __init__(self, meeting: _Meeting, place: int) -> None:
        super().__init__(meeting.full, meeting.guidance, {})
        self.place, self._meeting = place, meeting
        self.seen: torch.Tensor | None = None

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        self.seen = self.inputs(full, sample, noise_pred)
        self._meeting.present(self)
        return noise_pred


@dataclass(frozen=True)
class _Asks(Correction):
    """Of one image."""

    meeting: _Meeting
    place: int

    def begin(self) -> CorrectionState:
        return _Part(self.meeting, self.place)


@dataclass(frozen=True)
class _Predicts(Forecast):
    """Another forecast, with a correction of its own."""

    other: Forecast | None
    correction: Correction | None

    def at(self, feature: str, call: int, last: int, before: int | None) -> Coefficients | None:
        return None if self.other is None else self.other.at(feature, call, last, before)


@dataclass(frozen=True)
class Kernels:
    """Of one call.

    Attributes:
        kernel: fitted to all images.
        without: the same size and ridge, fitted without the images of each part.
    """

    kernel: Kernel
    without: tuple[Kernel, ...]

    def of(self, place: int) -> Kernel:
        """That which was fitted without an image."""
        return self.without[place % len(self.without)]


def best_kernels(images: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Kernels | None:
    """Those of the size and ridge that do best where images are left out; None if none beats no correction.

    Args:
        images: of each what a kernel sees [1, inputs, height, width], and what it should say
            [1, channels, height, width].
    """
    channels = images[0][1].shape[1]
    if len(images) == 1:
        return None  # there is nothing to try it on
    parts = [sum(map(_products, images[first::_PARTS]), _NOTHING) for first in range(min(_PARTS, len(images)))]
    whole = sum(parts, _NOTHING)
    patches = len(whole) - channels - 1
    best, least = None, _GAIN * float(whole[patches:-1, patches:-1].trace())
    for size in SIZES:
        # Of a patch's 9 places all, or the one in the middle; and of every patch what follows it.
        rows = torch.arange(patches)[:: 1 if size == 3 else 9] + (0 if size == 3 else 4)
        kept = torch.cat([rows, torch.arange(patches, len(whole))])
        own = [each[kept][:, kept] for each in parts]
        total = whole[kept][:, kept]
        for ridge in RIDGES:
            without = [_ridge(total - part, channels, ridge) for part in own]
            error = sum(map(_missed, without, own))
            if error < least:
                made = [_convolution(each, size) for each in (_ridge(total, channels, ridge), *without)]
                best, least = Kernels(made[0], tuple(made[1:])), error
    return best


def _convolution(solution: torch.Tensor, size: int) -> Kernel:
    """The kernel of a solution of ``_ridge``."""
    weight = solution[:-1].T.reshape(solution.shape[1], -1, size, size)
    return Kernel(weight.float().contiguous(), solution[-1].float())


_NOTHING = torch.zeros((), dtype=torch.float64)


def _missed(solution: torch.Tensor, products: torch.Tensor) -> float:
    """The sum of the squared errors of a solution of ``_ridge`` on images of which these are the products."""
    made = torch.cat([-solution[:-1], torch.eye(solution.shape[1], dtype=torch.float64), -solution[-1:]])
    return float((made * (products @ made)).sum())


def _ridge(products: torch.Tensor, channels: int, strength: float) -> torch.Tensor:
    """Weights and, in the last row, bias [inputs + 1, channels], of ``_products`` of inputs, answers and 1."""
    count, inputs = products[-1, -1], len(products) - channels - 1
    means = products[-1] / count
    centred = products - count * means[:, None] * means
    own = centred[:inputs, :inputs]
    penalty = strength * own.diagonal() + 1e-12 * own.diagonal().max().clamp(min=1e-12)
    weights = torch.linalg.solve(own + torch.diag(penalty), centred[:inputs, inputs:-1])
    return torch.cat([weights, (means[inputs:-1] - means[:inputs] @ weights)[None]])


def _products(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Of one image: sums of products of all that a kernel sees at a place, what it should say, and 1."""
    seen, said = pair
    patches = torch.nn.functional.unfold(seen.cpu(), 3, padding=1)[0].T
    answers = said.cpu().flatten(2)[0].T
    rows = torch.cat([patches, answers, torch.ones(len(patches), 1)], 1).double()
    return rows.T @ rows
