"""Correction of the UNet's outputs in a cached generation, by small convolutions that were fitted beforehand.

Much of the error of caching can be predicted from known tensors: the samples and outputs of this call and of the last
two full calls, the difference that the prompt made to each output, and the output of the previous call. A convolution
over these few channels of the latent's size removes the predictable part of the error. It takes little time compared
with a call of the UNet. ``tuning.lockstep`` fits the convolution so that the next latent is as close as possible to the
uncached one. Graphs and engines stay as they are.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Kernel:
    """Convolution that computes the correction of one call's output.

    Attributes:
        weight: [channels, inputs, size, size], fp32, with an odd size. ``CorrectionState.inputs`` gives the order of
            the inputs.
        bias: [channels].
    """

    weight: torch.Tensor
    bias: torch.Tensor

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the change to add to the output, [batch, channels, ...], for inputs [batch, inputs, ...]."""
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
        full: full calls of the schedule that the kernels were fitted for.
        guidance: guidance scale that combines the halves of a guided batch into one output; None without guidance.
    """

    kernels: Mapping[int, Kernel] = field(repr=False)
    full: tuple[int, ...]
    guidance: float | None = None

    def begin(self) -> CorrectionState:
        return CorrectionState(self.full, self.guidance, self.kernels)


class CorrectionState:
    """Samples and outputs of one generation that later corrections need.

    Args:
        full, guidance, kernels: as in ``Convolutions``.
    """

    def __init__(self, full: Sequence[int], guidance: float | None, kernels: Mapping[int, Kernel]) -> None:
        self._planned_full, self._guidance, self._kernels = full, guidance, kernels
        self._calls = 0
        self._batch_size: int | None = None
        # Output, sample and guidance difference of the last two full calls; see `record`.
        self._full_calls: list[tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]] = []
        self._previous_output: torch.Tensor | None = None
        self._left_schedule = False

    def correct(self, full: bool, sample: torch.Tensor, noise_pred: torch.Tensor) -> torch.Tensor:
        """Return the output of the next call, corrected.

        Corrections stop for the rest of the generation once it leaves the schedule, by an unplanned full call or
        another batch size.

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
        """Return the inputs of the next call's kernel: [images, inputs, height, width], fp32.

        The caller must call ``record`` afterwards. The inputs are, in this order:

        1. This call's output, sample and guidance difference (between both halves of the output; only with guidance).
        2. For the last full call, then for the full call before: its output, the change of the sample since then, and
           its guidance difference.
        3. The previous call's output, if that call was shallow.

        Returns:
            The inputs; None once the generation has left the schedule.
        """
        batch_size = len(noise_pred)
        self._batch_size = self._batch_size or batch_size
        planned = self._calls in self._planned_full
        odd_batch = self._guidance is not None and batch_size % 2 == 1
        self._left_schedule = self._left_schedule or full != planned or batch_size != self._batch_size or odd_batch
        if self._left_schedule:
            return None
        self._is_full = full
        self._sample, _ = self._combine_halves(sample.float(), 1.0)  # both halves hold the same latents
        self._output, self._difference = self._combine_halves(noise_pred.float(), self._guidance)
        channels = [self._output, self._sample, *self._difference]
        for full_output, full_sample, full_difference in reversed(self._full_calls):
            channels += [full_output, self._sample - full_sample, *full_difference]
        if self._previous_output is not None:
            channels.append(self._previous_output)
        return torch.cat(channels, 1)

    def record(self, change: torch.Tensor | None) -> None:
        """Record the output of the call whose inputs were returned last.

        Args:
            change: correction of the output; None if the output is not corrected.
        """
        output = self._output if change is None else self._output + change
        self._previous_output = None if self._is_full else output
        if self._is_full:
            self._full_calls = [*self._full_calls[-1:], (output, self._sample, self._difference)]
        self._calls += 1

    def _combine_halves(self, tensor: torch.Tensor, guidance: float | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return a batch's two halves (without and with the prompt) combined at a guidance scale, and their difference.

        Without guidance, return a copy of the batch and no difference.
        """
        if self._guidance is None or guidance is None:
            return tensor.clone(), []
        without, with_prompt = tensor.chunk(2)
        return without + guidance * (with_prompt - without), [with_prompt - without]
