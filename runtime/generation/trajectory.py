"""Trajectory: one latent on its way from noise to image, with the data of earlier calls that its later calls need."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from ...errors import InternalError
from .features import CachedFeatures
from .schedule import SKIP, Schedule

if TYPE_CHECKING:
    from .correction import CorrectionState
    from .guidance import GuidanceReuse


@dataclass(frozen=True, eq=False)
class Call:
    """One UNet call of a trajectory, which has begun.

    Attributes:
        trajectory: the trajectory that the call belongs to.
        number: index of the call in its trajectory, from 0.
        full: whether the full graph runs.
        cut: cut of a shallow call, ``SKIP`` for a call that runs no engine, None for a full call.
    """

    trajectory: Trajectory
    number: int
    full: bool
    cut: str | None

    @property
    def skipped(self) -> bool:
        """Whether no engine runs."""
        return self.cut == SKIP


class Trajectory:
    """Decides which calls of one latent are full, and holds the data of earlier calls that later calls need.

    A shallow call is allowed only after a completed call of the same trajectory and shapes. So the cached features of
    another latent, of other shapes, or of a failed call are never read:

        begin(shapes) -> full call       its features may not be read yet
        end()                            the call completed: its features may be read
        begin(shapes) -> shallow call    as the schedule says
        ...                              the call failed, so ``end`` is not called
        begin(shapes) -> full call       whatever the schedule says

    Attributes:
        index: index of the trajectory in its generation, in the order of the first calls.
        completed: number of calls that completed.
        features: cached features, from which shallow calls read.
        guidance: difference of the two halves of a guided batch, which shallow calls reuse; None where they do not.
        correction: inputs and outputs of earlier calls, from which outputs are corrected; None without correction.
        last_output: copy of the last output before its correction, which a skipped call repeats.

    Args:
        index: as the attribute.
        schedule: None makes every call full.
        cut: cut of the shallow calls for which the schedule has no cut.
        calls: number of calls; None where it is unknown.
        features: as the attribute.
    """

    def __init__(
        self, index: int, schedule: Schedule | None, cut: str | None, calls: int | None, features: CachedFeatures
    ) -> None:
        self.index = index
        self.completed = 0
        self.features = features
        self.guidance: GuidanceReuse | None = None
        self.correction: CorrectionState | None = None
        self.last_output: torch.Tensor | None = None
        self._schedule, self._cut, self._calls = schedule, cut, calls
        self._plan: tuple[bool, ...] | None = None
        self._shapes: Hashable = None
        self._valid = False
        self._conditioning: dict[Hashable, weakref.ref[torch.Tensor]] = {}

    @property
    def next_is_full(self) -> bool:
        """Whether the next call is full if it has the shapes of the last call.

        Raises:
            ScheduleError: the schedule needs the number of calls, or does not fit it.
        """
        return self._schedule is None or self._schedule.is_full(self.completed, self._calls) or not self._valid

    @property
    def plan(self) -> tuple[bool, ...] | None:
        """Whether the schedule makes each call full; None if the number of calls is unknown.

        Raises:
            ScheduleError: as ``next_is_full``.
        """
        schedule, calls = self._schedule, self._calls
        if self._plan is None and calls is not None:
            self._plan = tuple(schedule is None or schedule.is_full(call, calls) for call in range(calls))
        return self._plan

    def cut_of(self, call: int) -> str | None:
        """Return the cut of a call, if the call is shallow."""
        cut = None if self._schedule is None else self._schedule.cut_of(call)
        return self._cut if cut is None else cut

    def runs_engine(self, call: int) -> bool:
        """Return whether a planned call runs an engine."""
        return self.plan is None or self.plan[call] or self.cut_of(call) != SKIP

    def has_shapes(self, shapes: Hashable) -> bool:
        """Return whether a call of these shapes may read what earlier calls left; True before the first call."""
        return self.completed == 0 or (self._valid and shapes == self._shapes)

    def begin(self, shapes: Hashable, features_kept: bool = True) -> Call:
        """Begin a call.

        Args:
            shapes: value that identifies the input shapes, and so the buffers.
            features_kept: whether the features of the last full call still exist.

        Raises:
            ScheduleError: as ``next_is_full``.
        """
        cut = self.cut_of(self.completed)
        full = self.next_is_full or shapes != self._shapes or not (features_kept or cut == SKIP)
        self._valid = False  # until this call has completed
        self._shapes = shapes
        return Call(self, self.completed, full, None if full else cut)

    def end(self) -> None:
        """Record that the present call has completed."""
        self._valid = True
        self.completed += 1

    def invalidate(self) -> None:
        """Make the next call full."""
        self._valid = False

    def release(self) -> None:
        """Drop all tensors, and make the next call full."""
        self.invalidate()
        self.features.release()
        self.guidance = self.correction = self.last_output = None

    def repeated_output(self) -> torch.Tensor:
        """Return the output of a skipped call: a copy of the last output before its correction."""
        if self.last_output is None:
            raise InternalError("a skipped call has no earlier output of its trajectory to repeat")
        return self.last_output.clone()

    # The conditioning, by which trajectories are told apart

    def knows(self, conditioning: torch.Tensor | None) -> bool:
        """Return whether an earlier call was passed this very tensor, or the same view of it."""
        if conditioning is None:
            return False
        known = self._conditioning.get(_view_of(conditioning))
        return known is not None and known() is _base_of(conditioning)

    def remember(self, conditioning: torch.Tensor | None) -> None:
        """Remember the conditioning of a call, as long as the pipeline keeps the tensor."""
        if conditioning is not None and not self.knows(conditioning):
            self._conditioning = {key: base for key, base in self._conditioning.items() if base() is not None}
            self._conditioning[_view_of(conditioning)] = weakref.ref(_base_of(conditioning))


def _base_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor that a view belongs to; the tensor itself if it is no view."""
    base = tensor._base
    return tensor if base is None else base


def _view_of(tensor: torch.Tensor) -> Hashable:
    return id(_base_of(tensor)), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()
