"""Correction of the UNet's outputs in a cached generation, by small convolutions that were fitted beforehand.

The error of caching is not all noise. Much of it follows from known tensors: the sample and output of this call and of
the last two full calls, the difference that the prompt made to each output, and the output of the call before. A
convolution over these few channels of the latent's size removes that part of the error, in little time compared with a
call of the UNet. ``tuning.lockstep`` fits the convolution so that the sampler returns to where it would be without
caching. The engines are not involved.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Kernel:
    """Convolution for one call.

    Attributes:
        weight: [channels, inputs, size, size], fp32, size odd; the inputs as ``CorrectionState.inputs`` stacks them.
        bias: [channels].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return what to add to the output: [batch, channels, height, width] for [batch, inputs, height, width]."""
        weight, bias = (tensor.to(inputs.device, inputs.dtype) for tensor in (self.weight, self.bias))
        return torch.nn.functional.conv2d(inputs, weight, bias, padding=weight.shape[-1] // 2)


class Correction(ABC):
    """Correction of the outputs in generations with one schedule."""

    @abstractmethod
    def begin(self) -> CorrectionState:
        """Return the state for a generation, at its first call."""


@dataclass(frozen=True)
class Convolutions(Correction):
    """Correction by one convolution for each call.

    Attributes:
        kernels: convolutions by call; the outputs of other calls are not corrected.
        full: the schedule's full calls, which the kernels rely on.
        guidance: scale that combines the halves of a guided batch into one output; None where the pipeline does not
            guide.
    """

    kernels: Mapping[int, Kernel] = field(repr=False)
    full: tuple[int, ...]
    guidance: float | None = None

    def begin(self) -> CorrectionState:
        return CorrectionState(self.full, self.guidance, self.kernels)


class CorrectionState:
    """Samples and outputs of the calls of one generation, as far as later corrections need them.

    Args:
        full, guidance, kernels: as in ``Convolutions``.
    """

    def __init__(self, full: Sequence[int], guidance: float | None, kernels: Mapping[int, Kernel]) -> None:
        self._planned, self._guidance, self._kernels = full, guidance, kernels
        self._calls = 0
        self._rows: int | None = None
        # Output, sample and guidance difference of the last two full calls; see `record`.
        self._full: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
        self._previous: torch.Tensor | None = None
        self._left_schedule = False

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """Return the output of the next call, corrected.

        A generation that leaves the schedule (an unplanned full call, another batch size) is not corrected from then
        on.

        Args:
            full: whether the full graph ran.
            sample: [batch, channels, height, width], the UNet's input.
            noise_pred: [batch, channels, height, width], the UNet's output.
        """
        kernel = self._kernels.get(self._calls)
        inputs = self.inputs(full, sample, noise_pred)
        if inputs is None:
            return noise_pred
        change = None if kernel is None else kernel(inputs)
        self.record(change)
        if change is None:
            return noise_pred
        halves = 1 if self._guidance is None else 2
        return noise_pred + change.to(noise_pred.dtype).repeat(halves, 1, 1, 1)

    def inputs(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor | None:
        """Return the inputs of the next call's kernel, [images, inputs, height, width] in fp32; ``record`` must follow.

        In this order: the output, the sample, and under guidance the difference between both halves of the output; of
        the last full call, then of the full call before it, the output, the movement of the sample since then, and that
        call's difference; the output of the previous call if it was shallow. None once the schedule was left.
        """
        self._rows = self._rows or len(noise_pred)
        planned = self._calls in self._planned
        halved = self._guidance is not None and len(noise_pred) % 2
        self._left_schedule = self._left_schedule or full != planned or len(noise_pred) != self._rows or bool(halved)
        if self._left_schedule:
            return None
        self._is_full = full
        self._sample, _ = self._combined(sample.float(), 1.0)
        self._output, self._difference = self._combined(noise_pred.float(), self._guidance)
        channels = [self._output, self._sample, *self._difference]
        for output, at, difference in reversed(self._full):
            channels += [output, self._sample - at, *difference]
        if self._previous is not None:
            channels.append(self._previous)
        return torch.cat(channels, 1)

    def record(self, change: torch.Tensor | None) -> None:
        """Record that the call is over.

        Args:
            change: correction of the call's output; None for none.
        """
        output = self._output if change is None else self._output + change
        self._previous = None if self._is_full else output
        if self._is_full:
            self._full = [*self._full[-1:], (output, self._sample, self._difference)]
        self._calls += 1

    def _combined(self, tensor: torch.Tensor, guidance: float | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the guided combination of a batch's two halves (without and with the prompt), and their difference."""
        if self._guidance is None or guidance is None:
            return tensor.clone(), []
        without, with_prompt = tensor.chunk(2)
        return without + guidance * (with_prompt - without), [with_prompt - without]
