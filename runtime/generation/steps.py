"""Denoising steps: which UNet calls of a generation belong to the same step, and where a sampler starts again.

Most pipelines call the UNet once a step. Some call it several times: for each view of a panorama, or for each pass of
a guidance. The timestep of a call shows its step. Pipelines pass an element of the scheduler's ``timesteps``, a view
whose position in that tensor is known without reading the device. Equal timesteps at other positions are other steps:
samplers such as Heun repeat timesteps.
"""

from __future__ import annotations

from enum import Enum

import torch


class StepChange(Enum):
    """Relation of a call's denoising step to that of the call before."""

    SAME = "same"
    """The same step: another latent, or another pass."""
    NEXT = "next"
    """A later step; also the first step of all."""
    RESTART = "restart"
    """An earlier step: the sampler starts again."""


class StepTracker:
    """Steps of the calls so far.

    A timestep that is no view into a longer tensor is read on the host, which on a GPU waits for the device. Its value
    shows the step, with two ambiguities:

    * Samplers such as Heun and PNDM repeat timesteps from their second one on, and never the first. So calls that
      repeat the first timestep are other calls of its step, and a timestep that is repeated second is the sampler's.
    * KDPM2's midpoints may be slightly below the rounded step that follows. So a value that rises by less than 1, and
      not above the step before the last one, is a next step.

    Args:
        keyed: whether all calls are known to belong to one trajectory, so that rows may be at different timesteps.
        announced: whether the calls are known to form one generation, so that a value that rises is no restart
            (inversions, RePaint).
    """

    def __init__(self, *, announced: bool, keyed: bool = False) -> None:
        self._announced, self._keyed = announced, keyed
        self._timestep: torch.Tensor | float | None = None  # of the last call; keeps the tensor's memory in use
        self._values: list[float] = []  # of the last two steps, as far as they were read
        self._steps = 0
        self._calls_of_step = 0
        self._calls_of_first_step = 0
        self._sampler_repeats = False

    def change(self, timestep: torch.Tensor | float) -> StepChange:
        """Return the relation of a new call's step to that of the last recorded call."""
        if self._timestep is None:
            return StepChange.NEXT
        if not self._keyed and _differs_by_row(timestep):
            return StepChange.RESTART  # nothing shows which row was at which step before
        last, position = _position(self._timestep), _position(timestep)
        if last is not None and position is not None:
            if last[0] != position[0] or position[1] < last[1]:
                return StepChange.RESTART
            return StepChange.SAME if position == last else StepChange.NEXT
        return self._change_of_value(timestep_value(timestep))

    def record(self, timestep: torch.Tensor | float, change: StepChange) -> None:
        """Record a call that completed, with its ``change``."""
        if change is StepChange.SAME:
            self._calls_of_step += 1
        else:
            repeated = self._timestep is not None and _position(timestep) is None and self._is_last_value(timestep)
            self._sampler_repeats = self._sampler_repeats or repeated
            self._steps += 1
            self._calls_of_step = 1
            if _position(timestep) is None:
                self._values = [*self._values[-1:], timestep_value(timestep)]
        if self._steps == 1:
            self._calls_of_first_step = self._calls_of_step
        self._timestep = timestep

    def _change_of_value(self, value: float) -> StepChange:
        last = self._last_value()
        if value == last:
            another_call = self._steps == 1 or self._calls_of_step < self._calls_of_first_step
            sampler_repeats = self._sampler_repeats or self._steps == 2
            return StepChange.NEXT if sampler_repeats and not another_call else StepChange.SAME
        before = self._values[-2] if len(self._values) > 1 else last
        if not self._announced and value > last and not (value < last + 1 and value <= before):
            return StepChange.RESTART
        return StepChange.NEXT

    def _last_value(self) -> float:
        assert self._timestep is not None
        return self._values[-1] if _position(self._timestep) is None else timestep_value(self._timestep)

    def _is_last_value(self, timestep: torch.Tensor | float) -> bool:
        return timestep_value(timestep) == self._last_value()


def read_once(timestep: torch.Tensor | float) -> torch.Tensor | float:
    """Return a timestep whose step is known without waiting for the device: on the host, unless its place shows it."""
    if not isinstance(timestep, torch.Tensor) or _position(timestep) is not None:
        return timestep
    return timestep.cpu()


def _differs_by_row(timestep: torch.Tensor | float) -> bool:
    if not isinstance(timestep, torch.Tensor) or timestep.numel() < 2 or not any(timestep.stride()):
        return False
    return bool((timestep != timestep.flatten()[0]).any())


def timestep_value(timestep: torch.Tensor | float) -> float:
    """Return the timestep as a number; on a GPU this waits for the device."""
    return float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep)


def _position(timestep: torch.Tensor | float) -> tuple[int, int] | None:
    """Return the address of the longer tensor that holds a timestep, and the place in it; None for other timesteps."""
    if not isinstance(timestep, torch.Tensor) or any(
        stride for size, stride in zip(timestep.shape, timestep.stride(), strict=True) if size > 1
    ):
        return None  # a number, or one timestep for each image
    storage = timestep.untyped_storage()
    is_element = storage.nbytes() > timestep.element_size()
    return (storage.data_ptr(), int(timestep.storage_offset())) if is_element else None
