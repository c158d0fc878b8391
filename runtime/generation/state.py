"""State of one generation: the UNet calls for one batch of images, and the data that later calls read.

Each generation starts with a new ``GenerationState``, whose tensors are released at the end of the generation.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...errors import ScheduleError
from .schedule import SKIP, Adaptive, Schedule

if TYPE_CHECKING:
    import torch

    from .correction import CorrectionState
    from .feature_drift import FeatureDriftEstimator
    from .forecast import FeatureHistory
    from .guidance import GuidanceReuse

Calls = int | Callable[[], int] | None
"""The number of calls, or a function that returns it at the first call; None where it is unknown."""

Guided = bool | Callable[[], bool]
"""Whether calls are made with classifier-free guidance, or a function that returns it at the first call."""


@dataclass(frozen=True)
class Run:
    """Record of a generation, call by call.

    Attributes:
        full: for each call, whether the full graph ran.
        seconds: for each call the engine's own time if ``unet.record_times`` was set; otherwise empty.
        schedule: schedule of the generation; None if every call is full.
        cut: cut of the shallow calls for which the schedule has no cut.
        calls: announced number of calls; None if it was not announced.
        cuts: for each call the cut of the shallow graph that ran; None for a full call, ``SKIP`` for a skipped one.
    """

    full: tuple[bool, ...]
    seconds: tuple[float, ...]
    schedule: Schedule | None
    cut: str | None
    calls: int | None
    cuts: tuple[str | None, ...]

    @property
    def full_calls(self) -> tuple[int, ...]:
        """Indices of the full calls."""
        return tuple(call for call, full in enumerate(self.full) if full)

    @property
    def timeline(self) -> str:
        """One character for each call: ``#`` for a full call, ``.`` for a shallow one, ``_`` for a skipped one."""
        calls = zip(self.full, self.cuts, strict=True)
        return "".join("#" if full else "_" if cut == SKIP else "." for full, cut in calls)


class GenerationState:
    """Decides which calls of one generation are full, and holds the data of earlier calls that later calls need.

    A shallow call is allowed only after a completed full call of the same generation and shapes. So the cached features
    of another image, of other shapes, or of a failed call are never read:

        begin(shapes) -> True     a full call begins
        end(True)                 the call completed: its features may be read
        begin(shapes) -> False    a shallow call begins, as the schedule says
        ...                       the call failed, so end is not called
        begin(shapes) -> True     a full call begins, whatever the schedule says

    The UNet sets the attributes below at the first call; each is None if no call needs it.

    Attributes:
        history: features of the last two full calls, from which a forecast predicts.
        guidance: difference of the two halves of a guided batch, which shallow calls reuse.
        drift: estimate of the change of the features, from which an adaptive schedule decides.
        correction: inputs and outputs of earlier calls, from which outputs are corrected.
        last_output: copy of the last call's noise prediction before correction, which a skipped call repeats.

    Args:
        schedule: None makes every call full.
        cut: cut of the shallow calls for which the schedule has no cut.
        calls: number of calls. A function is called at the first call, because a pipeline knows the number only then.
        guided: whether calls are made with classifier-free guidance. A function is called at the first call.

    Raises:
        ScheduleError: the schedule needs to know the number of calls.
    """

    def __init__(
        self, schedule: Schedule | None, cut: str | None = None, calls: Calls = None, guided: Guided = False
    ) -> None:
        self.history: FeatureHistory | None = None
        self.guidance: GuidanceReuse | None = None
        self.drift: FeatureDriftEstimator | None = None
        self.correction: CorrectionState | None = None
        self.last_output: torch.Tensor | None = None
        self._schedule = schedule
        self._cut = cut
        self._calls = calls
        self._guided = guided
        self._shapes: Hashable = None
        self._features_valid = False
        self._timesteps: deque[float] = deque(maxlen=2)
        self._full: list[bool] = []
        self._seconds: list[float] = []
        self._plan: tuple[bool, ...] | None = None
        self._last_full: int | None = None
        self._decision: tuple[int, bool] | None = None  # by an adaptive schedule: the call, and whether it is full
        if schedule is not None and calls is None:
            self._is_full(schedule, 0, None)  # raises where the schedule needs the number of calls

    @property
    def next_is_full(self) -> bool:
        """Whether the next call is full if it has the shapes of the last call.

        Raises:
            ScheduleError: as ``begin``.
        """
        calls = self._resolve_calls()
        return (
            self._schedule is None or self._is_full(self._schedule, self.completed, calls) or not self._features_valid
        )

    @property
    def guided(self) -> bool:
        """Whether calls are made with classifier-free guidance; resolved once, during a call."""
        if not isinstance(self._guided, bool):
            self._guided = self._guided()
        return self._guided

    @property
    def completed(self) -> int:
        """Number of calls that completed."""
        return len(self._full)

    @property
    def last_was_full(self) -> bool:
        """Whether the last call that completed ran the full graph."""
        return self._full[-1]

    @property
    def plan(self) -> tuple[bool, ...] | None:
        """Whether the schedule makes each call full; None if the number of calls or the choice is unknown.

        Raises:
            ScheduleError: as ``begin``.
        """
        calls = self._resolve_calls()
        schedule = self._schedule
        if self._plan is None and calls is not None and not (schedule is not None and schedule.adaptive):
            self._plan = tuple(schedule is None or schedule.is_full(call, calls) for call in range(calls))
        return self._plan

    def cut_of(self, call: int) -> str | None:
        """Return the cut of a call, if the call is shallow."""
        cut = None if self._schedule is None else self._schedule.cut_of(call)
        return self._cut if cut is None else cut

    def skips(self, call: int) -> bool:
        """Return whether a call is skipped (runs no engine), if it is not full."""
        return self.cut_of(call) == SKIP

    def begin(self, shapes: Hashable, timestep: float | None = None) -> bool:
        """Begin a call, and return whether it is full.

        Args:
            shapes: value that identifies the input shapes, and so the buffers.
            timestep: timestep of the call, for ``continues``; None if the generation was announced.

        Raises:
            ScheduleError: the schedule does not fit the number of calls, or the number of calls is below 1.
        """
        full = self.next_is_full or shapes != self._shapes
        self._features_valid = False  # until this call has completed
        self._shapes = shapes
        if timestep is not None:
            self._timesteps.append(timestep)
        return full

    def end(self, full: bool, seconds: float | None = None) -> None:
        """Record that the current call has completed."""
        self._features_valid = True
        if full:
            self._last_full = len(self._full)
        self._full.append(full)
        if seconds is not None:
            self._seconds.append(seconds)

    def invalidate(self) -> None:
        """Make the next call full."""
        self._features_valid = False

    def release(self) -> None:
        """Drop all tensors, and make the next call full; the record of the calls stays."""
        self.invalidate()
        self.history = self.guidance = self.drift = self.correction = self.last_output = None

    def continues(self, shapes: Hashable, timestep: float) -> bool:
        """Return whether an unannounced call belongs to this generation, from its shapes and timestep.

        Timesteps fall during a generation, with two exceptions: they repeat in Heun and PNDM, and in KDPM2 a midpoint
        may be slightly below the rounded step that follows it. So a new generation begins if the timestep rises by 1 or
        more. It also begins if the timestep rises above both of the last two; this rule serves schedulers whose
        timesteps are not 0 to 1000, such as EDM.

        Some calls of one generation are taken for new generations, which only costs full calls: with inverse
        schedulers, whose timesteps rise, and at RePaint's jumps back. One new generation is missed: if an exception
        outside the UNet ended the last one, and the new one begins at or below the last timestep. ``unet.reset()`` or
        an announced generation avoids that.
        """
        if not self._features_valid or shapes != self._shapes:
            return False
        before, last = self._timesteps[0], self._timesteps[-1]
        return timestep <= last or (timestep < last + 1 and timestep <= before)

    def run(self) -> Run:
        """Return the record of the calls so far."""
        calls = self._calls if isinstance(self._calls, int) else None
        cuts = tuple(None if full else self.cut_of(call) for call, full in enumerate(self._full))
        return Run(tuple(self._full), tuple(self._seconds), self._schedule, self._cut, calls, cuts)

    def _is_full(self, schedule: Schedule, call: int, calls: int | None) -> bool:
        """Return whether the schedule makes this call full; an adaptive schedule decides once for each call."""
        if not isinstance(schedule, Adaptive):
            return schedule.is_full(call, calls)
        if self._decision is None or self._decision[0] != call:
            last = self._last_full

            def predicted_error() -> float | None:
                return None if self.drift is None or last is None else self.drift.predicted_error(call, last)

            self._decision = call, schedule.decide(call, calls, last, predicted_error)
        return self._decision[1]

    def _resolve_calls(self) -> int | None:
        """Return the number of calls, which is resolved when the first call begins."""
        if self._calls is not None and not isinstance(self._calls, int):
            self._calls = self._calls()
        if self._calls is not None and self._calls < 1:
            raise ScheduleError(f"{self._calls} UNet calls were announced, but a generation has at least 1")
        return self._calls
