"""Guidance at half the cost of shallow calls: they compute only the second half of the batch.

Classifier-free guidance calls the UNet with the same latents twice, without the prompt and with it. The difference
between the two outputs changes slowly, as the deep features do. So a shallow call may compute the second half only,
and derive the first half from the difference at the last full call.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

from ...errors import ScheduleError


class GuidanceReuse:
    """Difference between the two halves of a guided batch at the last full call of a trajectory.

    Args:
        sample: [2 * images, channels, ...], the latents of the first call.

    Raises:
        ScheduleError: the two halves differ: the pipeline uses another kind of guidance, or none.
    """

    def __init__(self, sample: torch.Tensor) -> None:
        half = sample.shape[0] // 2
        if sample.shape[0] % 2 or not torch.equal(sample[:half], sample[half:]):
            raise ScheduleError(
                "reuse_guidance needs UNet calls with the same latents twice, and this pipeline makes others: leave "
                "reuse_guidance out"
            )
        self._batch_size = sample.shape[0]
        self._difference: torch.Tensor | None = None

    def applies_to(self, sample: torch.Tensor) -> bool:
        """Return whether a call is guided: a pipeline may stop guiding, and then passes half the batch."""
        return sample.shape[0] == self._batch_size

    def record(self, noise_pred: torch.Tensor) -> None:
        """Record the difference between the halves of a full call's output."""
        first, second = noise_pred.chunk(2)
        self._difference = second - first

    def whole_output(self, second: torch.Tensor) -> torch.Tensor:
        """Return the noise prediction of the whole batch, from that of the second half, as a new tensor."""
        assert self._difference is not None
        return torch.cat([second - self._difference, second])


def second_half(tensors: Mapping[str, torch.Tensor], batched: Collection[str]) -> dict[str, torch.Tensor]:
    """Return the second half of each input that has a batch dimension, and the other inputs whole."""
    return {name: tensor.chunk(2)[1] if name in batched else tensor for name, tensor in tensors.items()}
