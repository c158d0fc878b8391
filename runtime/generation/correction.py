"""Correcting what the UNet answers in a cached generation, by small convolutions that were fitted beforehand.

What caching leaves wrong is not all noise. Much of it follows from what is at hand: this call's answer and sample, what
the last two full calls were asked and answered, what the prompt had added to each answer, and the answer before. A
convolution over these few channels of the latent's size takes it out, in no time beside a call of the UNet.
``tuning.lockstep`` fits it so that the sampler gets back to where it would be without caching. No engine knows of it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Kernel:
    """Of one call.

    Attributes:
        weight: [channels, inputs, size, size], fp32, size odd; inputs as ``CorrectionState.inputs`` stacks them.
        bias: [channels].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """What to add to the answer: [batch, channels, height, width] for [batch, inputs, height, width]."""
        weight, bias = (each.to(inputs.device, inputs.dtype) for each in (self.weight, self.bias))
        return torch.nn.functional.conv2d(inputs, weight, bias, padding=weight.shape[-1] // 2)


class Correction(ABC):
    """Of the answers in generations of one schedule."""

    @abstractmethod
    def begin(self) -> CorrectionState:
        """What one generation needs, at its first call."""


@dataclass(frozen=True)
class Convolutions(Correction):
    """One for each call.

    Attributes:
        kernels: by call; the others' answers stay as they are.
        full: the schedule's full calls, which the kernels rely on.
        guidance: scale by which both halves of a guided batch make one answer; None where the pipeline does not guide.
    """

    kernels: Mapping[int, Kernel] = field(repr=False)
    full: tuple[int, ...]
    guidance: float | None = None

    def begin(self) -> CorrectionState:
        return CorrectionState(self.full, self.guidance, self.kernels)


class CorrectionState:
    """What the calls of one generation were asked and answered, as far as later corrections need it.

    Args:
        full, guidance, kernels: as in ``Convolutions``.
    """

    def __init__(self, full: Sequence[int], guidance: float | None, kernels: Mapping[int, Kernel]) -> None:
        self._planned, self._guidance, self._kernels = full, guidance, kernels
        self._calls = 0
        self._rows: int | None = None
        self._full: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []  # of the last two: see `keep`
        self._previous: torch.Tensor | None = None
        self._lost = False

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """The answer of the next call, corrected.

        A generation that leaves the schedule (a full call that was not planned, another batch size) is not corrected
        from there on.

        Args:
            full: whether the full graph ran.
            sample: [batch, channels, height, width], as the UNet got it.
            noise_pred: what it answered, [batch, channels, height, width].
        """
        kernel = self._kernels.get(self._calls)
        inputs = self.inputs(full, sample, noise_pred)
        if inputs is None:
            return noise_pred
        change = None if kernel is None else kernel(inputs)
        self.keep(change)
        if change is None:
            return noise_pred
        halves = 1 if self._guidance is None else 2
        return noise_pred + change.to(noise_pred.dtype).repeat(halves, 1, 1, 1)

    def inputs(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor | None:
        """What a kernel of the next call sees, [images, inputs, height, width] in fp32; ``keep`` must follow.

        In this order: the answer, the sample, and under guidance the difference between both halves of the answer; of
        the last full call and of the one before its answer, how far the sample has come since, and that difference; the
        answer of the call before, if that was shallow. None once the schedule was left.
        """
        self._rows = self._rows or len(noise_pred)
        planned = self._calls in self._planned
        halved = self._guidance is not None and len(noise_pred) % 2
        self._lost = self._lost or full != planned or len(noise_pred) != self._rows or bool(halved)
        if self._lost:
            return None
        self._is_full = full
        self._sample, _ = self._one(sample.float(), 1.0)
        self._answer, self._apart = self._one(noise_pred.float(), self._guidance)
        seen = [self._answer, self._sample, *self._apart]
        for answer, at, apart in reversed(self._full):
            seen += [answer, self._sample - at, *apart]
        if self._previous is not None:
            seen.append(self._previous)
        return torch.cat(seen, 1)

    def keep(self, change: torch.Tensor | None) -> None:
        """The call is over.

        Args:
            change: by which its answer was corrected; None for none.
        """
        answer = self._answer if change is None else self._answer + change
        self._previous = None if self._is_full else answer
        if self._is_full:
            self._full = [*self._full[-1:], (answer, self._sample, self._apart)]
        self._calls += 1

    def _one(self, tensor: torch.Tensor, guidance: float | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Both halves of a guided batch as one, from that without the prompt to the prompt's; and their difference."""
        if self._guidance is None or guidance is None:
            return tensor.clone(), []
        without, prompted = tensor.chunk(2)
        return without + guidance * (prompted - without), [prompted - without]
