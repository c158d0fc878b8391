"""One generation: the UNet calls that make one batch of images, and the state that lives no longer than they do."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from ...errors import ScheduleError
from .schedule import SKIP, Adaptive, Schedule

Calls = int | Callable[[], int] | None
"""A number of calls, or how to find it out at the first call, or None where nobody knows."""

Missed = Callable[[int, int], float | None]
"""What a call would miss if it were shallow, relative to the features: (call, last full call); None if unknown."""

Guided = bool | Callable[[], bool]
"""Whether calls are made with classifier-free guidance, or how to find it out at the first call."""


@dataclass(frozen=True)
class Run:
    """What a generation did, call by call.

    Attributes:
        full: for each call, whether the full graph ran.
        seconds: for each call the engine's own time, where ``unet.record_times`` was set; otherwise empty.
        schedule: None where every call is full.
        cut: of the shallow calls to which the schedule gives none of their own.
        calls: the number of calls that was announced; None where none was.
        cuts: for each call the cut of the shallow graph that ran; None for a full one, ``SKIP`` where no graph ran.
    """

    full: tuple[bool, ...]
    seconds: tuple[float, ...]
    schedule: Schedule | None
    cut: str | None
    calls: int | None
    cuts: tuple[str | None, ...]

    @property
    def full_calls(self) -> tuple[int, ...]:
        """The indices of the full calls."""
        return tuple(call for call, full in enumerate(self.full) if full)

    @property
    def timeline(self) -> str:
        """One character for each call: ``#`` for a full one, ``.`` for a shallow one, ``_`` where no engine ran."""
        calls = zip(self.full, self.cuts, strict=True)
        return "".join("#" if full else "_" if cut == SKIP else "." for full, cut in calls)


class GenerationState:
    """Counts the calls of one generation and says of each whether it runs the full graph.

    A shallow call is allowed only where a full call of the same generation and shapes has completed, so that cached
    features of another image, of other shapes, or of a call that failed are never read:

        begin(shapes) -> True     a full call follows
        end(True)                 it completed: its features may be read
        begin(shapes) -> False    as the schedule says
        ...                       no end: the call failed
        begin(shapes) -> True     whatever the schedule says

    Args:
        schedule: None makes every call full.
        cut: of shallow calls to which the schedule gives none of their own.
        calls: how many calls there will be. A function is asked at the first call, since a pipeline knows only then.
        guided: whether each call is made with classifier-free guidance, likewise.

    Raises:
        ScheduleError: the schedule needs to know the number of calls.
    """

    missed: Missed | None = None
    """Foretells for an adaptive schedule what a shallow call would miss; set by whoever runs the calls."""

    def __init__(
        self, schedule: Schedule | None, cut: str | None = None, calls: Calls = None, guided: Guided = False
    ) -> None:
        self._schedule = schedule
        self._cut = cut
        self._calls = calls
        self._guided = guided
        self._shapes: Hashable = None
        self._readable = False
        self._timesteps: deque[float] = deque(maxlen=2)
        self._full: list[bool] = []
        self._seconds: list[float] = []
        self._plan: tuple[bool, ...] | None = None
        self._last_full: int | None = None
        self._decided: tuple[int, bool] | None = None
        if schedule is not None and calls is None:
            self._scheduled(schedule, 0, None)  # raises where the schedule cannot do without the number of calls

    @property
    def next_is_full(self) -> bool:
        """Whether the next call is full even if its shapes are those of the last one.

        Raises:
            ScheduleError: as ``begin``.
        """
        calls = self._resolve()
        return self._schedule is None or self._scheduled(self._schedule, self.made, calls) or not self._readable

    @property
    def guided(self) -> bool:
        """Whether its calls are made with classifier-free guidance; asked once, when a call is under way."""
        if not isinstance(self._guided, bool):
            self._guided = self._guided()
        return self._guided

    @property
    def made(self) -> int:
        """Calls that completed."""
        return len(self._full)

    @property
    def last_was_full(self) -> bool:
        """Whether the last call that completed ran the full graph."""
        return self._full[-1]

    @property
    def plan(self) -> tuple[bool, ...] | None:
        """For each call whether the schedule has it full; None where nobody knows how many there will be, or which.

        Raises:
            ScheduleError: as ``begin``.
        """
        calls = self._resolve()
        schedule = self._schedule
        if self._plan is None and calls is not None and not (schedule is not None and schedule.adaptive):
            self._plan = tuple(schedule is None or schedule.is_full(call, calls) for call in range(calls))
        return self._plan

    def cut_of(self, call: int) -> str | None:
        """The cut of a call if it is shallow."""
        named = None if self._schedule is None else self._schedule.cut_of(call)
        return self._cut if named is None else named

    def skips(self, call: int) -> bool:
        """Whether a call runs no engine if it is not full."""
        return self.cut_of(call) == SKIP

    def begin(self, shapes: Hashable, timestep: float | None = None) -> bool:
        """Whether the call that now begins is full.

        Args:
            shapes: anything that tells one set of input shapes, and so of buffers, from another.
            timestep: only for ``continues``; None where the generation was announced.

        Raises:
            ScheduleError: the schedule does not fit the number of calls, or that number is none.
        """
        full = self.next_is_full or shapes != self._shapes
        self._readable = False  # until this call has completed
        self._shapes = shapes
        if timestep is not None:
            self._timesteps.append(timestep)
        return full

    def end(self, full: bool, seconds: float | None = None) -> None:
        """The call that began completed."""
        self._readable = True
        if full:
            self._last_full = len(self._full)
        self._full.append(full)
        if seconds is not None:
            self._seconds.append(seconds)

    def invalidate(self) -> None:
        """Make the next call full."""
        self._readable = False

    def continues(self, shapes: Hashable, timestep: float) -> bool:
        """Whether a call that nobody announced belongs to this generation, judging by its shapes and timestep.

        Timesteps fall through a generation. They repeat in Heun and PNDM, and in KDPM2 a midpoint may lie a fraction
        below the rounded step that follows it. So only a rise by 1 or more begins a new generation, or one above the
        timestep before the last too (which finds it also where timesteps are not 0 to 1000, as in EDM).

        This errs towards new generations, that is full calls: inverse schedulers, whose timesteps rise all the time,
        and RePaint's jumps back. One case goes unnoticed: after an exception outside the UNet, a generation that begins
        at or below the timestep where the last one broke off. ``unet.reset()`` or an announced generation settles it.
        """
        if not self._readable or shapes != self._shapes:
            return False
        before, last = self._timesteps[0], self._timesteps[-1]
        return timestep <= last or (timestep < last + 1 and timestep <= before)

    def run(self) -> Run:
        """What was done so far."""
        calls = self._calls if isinstance(self._calls, int) else None
        cuts = tuple(None if full else self.cut_of(call) for call, full in enumerate(self._full))
        return Run(tuple(self._full), tuple(self._seconds), self._schedule, self._cut, calls, cuts)

    def _scheduled(self, schedule: Schedule, call: int, calls: int | None) -> bool:
        """Whether the schedule has this call full; of one that decides as it goes, the same each time it is asked."""
        if not isinstance(schedule, Adaptive):
            return schedule.is_full(call, calls)
        if self._decided is None or self._decided[0] != call:
            last, missed = self._last_full, self.missed

            def told() -> float | None:
                return None if missed is None or last is None else missed(call, last)

            self._decided = call, schedule.decide(call, calls, last, told)
        return self._decided[1]

    def _resolve(self) -> int | None:
        """The number of calls, asked for when the first call begins."""
        if self._calls is not None and not isinstance(self._calls, int):
            self._calls = self._calls()
        if self._calls is not None and self._calls < 1:
            raise ScheduleError(f"{self._calls} UNet calls were announced, but a generation has at least 1")
        return self._calls
