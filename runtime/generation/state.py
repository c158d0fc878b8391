"""State of one generation: the UNet calls of one pipeline call, told apart by the latents that they belong to.

Each generation starts with a new ``GenerationState``, whose tensors are released at the end of the generation. Most
generations have one trajectory. A panorama has one for each view, and a pipeline that calls the UNet twice a step has
one for each of the two calls. FreeInit runs several trajectories one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...errors import ScheduleError
from .features import CachedFeatures
from .forecast import Forecast
from .schedule import SKIP, Schedule
from .steps import Step, StepChange, StepTracker, is_value
from .trajectory import Call, Trajectory

if TYPE_CHECKING:
    import torch

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
        calls: announced number of calls of each trajectory; None if it was not announced.
        cuts: for each call the cut of the shallow graph that ran; None for a full call, ``SKIP`` for a skipped one.
        trajectories: for each call the index of its trajectory.
        copied_bytes: largest size of the copies of cached features, which several trajectories or a forecast need.
    """

    full: tuple[bool, ...]
    seconds: tuple[float, ...]
    schedule: Schedule | None
    cut: str | None
    calls: int | None
    cuts: tuple[str | None, ...]
    trajectories: tuple[int, ...]
    copied_bytes: int

    @property
    def full_calls(self) -> tuple[int, ...]:
        """Indices of the full calls."""
        return tuple(call for call, full in enumerate(self.full) if full)

    @property
    def timeline(self) -> str:
        """One character for each call: ``#`` for a full call, ``.`` for a shallow one, ``_`` for a skipped one."""
        calls = zip(self.full, self.cuts, strict=True)
        return "".join("#" if full else "_" if cut == SKIP else "." for full, cut in calls)


@dataclass(eq=False)
class _Group:
    """Trajectories whose calls are told apart by their order within a step; see ``GenerationState.begin``."""

    steps: StepTracker
    trajectories: list[Trajectory] = field(default_factory=list)
    called: list[Trajectory] = field(default_factory=list)  # in the present step, in the order of the calls
    ordered: bool = False  # whether only the order told a call of the present step from other trajectories
    calls_of_last_step: int = 0

    def repeats(self, conditioning: torch.Tensor | None) -> bool | None:
        """Return whether the conditioning shows that a call's trajectory was called in the present step before.

        None without conditioning.
        """
        if conditioning is None:
            return None
        known = [trajectory for trajectory in self.trajectories if trajectory.knows(conditioning)]
        return bool(known) and all(trajectory in self.called for trajectory in known)


class GenerationState:
    """Tells the calls of a generation apart by trajectory, and holds the trajectories.

    Attributes:
        order_changed: numbers of calls of two consecutive steps if they differ and only the order of the calls told
            the trajectories apart; otherwise None.
        steps_before: steps of the runs that a restart has ended, as far as known, by the keys of the groups.
        exceeded: announced number of calls of each trajectory if one of them made more calls; otherwise None.

    Args:
        schedule: None makes every call full.
        cut: cut of the shallow calls for which the schedule has no cut.
        calls: number of calls of each trajectory. A function is called when the sampler starts, and again when it
            starts again, because a pipeline knows the number only then.
        guided: whether calls are made with classifier-free guidance. A function is called at the first call.
        forecast: prediction of the cached features; None reuses the features.
        announced: whether all calls are known to belong to one generation.
        previous: the unannounced generation before, with which this one may take turns.

    Raises:
        ScheduleError: the schedule needs to know the number of calls.
    """

    def __init__(
        self,
        schedule: Schedule | None,
        cut: str | None = None,
        calls: Calls = None,
        guided: Guided = False,
        *,
        forecast: Forecast | None = None,
        announced: bool = True,
        previous: GenerationState | None = None,
    ) -> None:
        self.order_changed: tuple[int, int] | None = None
        self.exceeded: int | None = None
        self._schedule, self._cut, self._forecast = schedule, cut, forecast
        self._calls, self._guided, self._announced = calls, guided, announced
        self._resolved_calls: int | None = None
        self.steps_before: dict[tuple[Hashable, bool], list[Step]] = {} if previous is None else previous.steps_before
        self._groups: dict[tuple[Hashable, bool], _Group] = {}  # by key, and by whether timesteps are passed by value
        self._begun: tuple[Call, _Group, StepChange, torch.Tensor | float] | None = None
        self._full: list[bool] = []
        self._cuts: list[str | None] = []
        self._indices: list[int] = []
        self._seconds: list[float] = []
        self._trajectories = 0
        self._peak_bytes = 0
        if schedule is not None and calls is None:
            schedule.is_full(0, None)  # raises where the schedule needs the number of calls

    @property
    def guided(self) -> bool:
        """Whether calls are made with classifier-free guidance; resolved once, during a call."""
        if not isinstance(self._guided, bool):
            self._guided = self._guided()
        return self._guided

    @property
    def trajectories(self) -> list[Trajectory]:
        """Trajectories that have not ended, in the order of their first calls."""
        return [trajectory for group in self._groups.values() for trajectory in group.trajectories]

    @property
    def copied_bytes(self) -> int:
        """Size of the copies of cached features."""
        return sum(trajectory.features.bytes for trajectory in self.trajectories)

    def next_is_full(self, timestep: torch.Tensor | float) -> bool:
        """Return whether a call is surely full; True where the trajectory of the call is not yet known.

        Raises:
            ScheduleError: as ``begin``.
        """
        trajectories, group = self.trajectories, self._groups.get((None, is_value(timestep)))
        if len(trajectories) != 1 or group is None:
            return True
        return group.steps.change(timestep) is not StepChange.NEXT or trajectories[0].next_is_full

    def begin(
        self,
        shapes: Hashable,
        timestep: torch.Tensor | float,
        conditioning: torch.Tensor | None = None,
        key: Hashable = None,
        features_kept: Callable[[CachedFeatures], bool] = lambda features: True,
    ) -> Call:
        """Begin a call of the UNet.

        Calls at one step belong to different trajectories. A call belongs to the trajectory whose earlier calls were
        passed the same conditioning tensor. Where several or none were, the order tells: the n-th call of a step
        belongs to the n-th trajectory. Calls that pass elements of the scheduler's timesteps and calls that pass values
        of their own, e.g. from a callback, are of different loops, so they never share a trajectory. A key makes the
        first three unnecessary.

        Args:
            shapes: value that identifies the input shapes, and so the buffers.
            timestep: the call's timestep, as passed to the UNet.
            conditioning: text embeddings or similar, as passed to the UNet.
            key: identifies the trajectory; None to tell it as above.
            features_kept: function that returns whether cached features still exist.

        Raises:
            ScheduleError: the schedule does not fit the number of calls, or the number of calls is below 1.
        """
        loop = key, is_value(timestep)
        group = self._groups.get(loop) or self._new_group(loop)
        change = group.steps.change(timestep, group.repeats(conditioning))
        if change is StepChange.RESTART:
            self._release(loop, group)
            group, change = self._new_group(loop), StepChange.NEXT
            if key is None:
                self._resolved_calls = None
        self._groups[loop] = group
        if key is not None:
            trajectory = group.trajectories[0] if group.trajectories else self._add_to(group)
        else:
            trajectory = self._trajectory_of(group, change, conditioning)
        trajectory.remember(conditioning)
        if self._resolved_calls is not None and trajectory.completed == self._resolved_calls:
            self.exceeded = self._resolved_calls if self._schedule is not None else None
        call = trajectory.begin(shapes, features_kept(trajectory.features))
        self._begun = call, group, change, timestep
        return call

    def end(self, call: Call, seconds: float | None = None) -> None:
        """Record that a call has completed."""
        assert self._begun is not None
        assert self._begun[0] is call
        _, group, change, timestep = self._begun
        self._begun = None
        if change is not StepChange.SAME:
            group.called.clear()
        group.called.append(call.trajectory)
        group.steps.record(timestep, change)
        call.trajectory.end()
        self._full.append(call.full)
        self._cuts.append(call.cut)
        self._indices.append(call.trajectory.index)
        self._peak_bytes = max(self._peak_bytes, self.copied_bytes)
        if seconds is not None:
            self._seconds.append(seconds)

    def finish(self) -> None:
        """Record that the generation has made all its calls."""
        for group in self._groups.values():
            self._compare_steps(group)

    def continues(
        self,
        shapes: Hashable,
        timestep: torch.Tensor | float,
        conditioning: torch.Tensor | None = None,
        key: Hashable = None,
    ) -> bool:
        """Return whether an unannounced call belongs to this generation.

        It does not if the sampler starts again, if the last call failed, if its trajectory had other shapes, or if its
        timestep is a value and those before were elements of a tensor, or the other way round.

        Some calls of one generation are taken for new generations, which only costs full calls. One new generation is
        missed: if an exception outside the UNet ended the last one, and the new one begins at or below the last
        timestep, with timesteps that are no elements of a longer tensor. ``unet.reset()`` or an announced generation
        avoids that.
        """
        if self._begun is not None:
            return False
        if key is not None:
            return True
        group = self._groups.get((None, is_value(timestep)))
        if group is None:
            return (None, not is_value(timestep)) not in self._groups
        change = group.steps.change(timestep, group.repeats(conditioning))
        if change is StepChange.RESTART:
            return False
        index = len(group.called) if change is StepChange.SAME else 0
        return index >= len(group.trajectories) or group.trajectories[index].has_shapes(shapes)

    def invalidate(self) -> None:
        """Make the next call of every trajectory full."""
        for trajectory in self.trajectories:
            trajectory.invalidate()

    def release(self) -> None:
        """Drop all tensors, and make the next call full; the record of the calls stays."""
        for loop, group in self._groups.items():
            self._release(loop, group)
        self._groups = {}

    def run(self) -> Run:
        """Return the record of the calls so far."""
        calls = self._calls if isinstance(self._calls, int) else self._resolved_calls
        return Run(
            tuple(self._full),
            tuple(self._seconds),
            self._schedule,
            self._cut,
            calls,
            tuple(self._cuts),
            tuple(self._indices),
            self._peak_bytes,
        )

    def _new_group(self, loop: tuple[Hashable, bool]) -> _Group:
        before = self.steps_before.get(loop, ())
        return _Group(StepTracker(announced=self._announced, keyed=loop[0] is not None, before=before))

    def _trajectory_of(self, group: _Group, change: StepChange, conditioning: torch.Tensor | None) -> Trajectory:
        """Return the trajectory of a call, by its conditioning or its order in the step."""
        called = group.called if change is StepChange.SAME else []
        if change is StepChange.NEXT:
            self._compare_steps(group)
        free = [trajectory for trajectory in group.trajectories if trajectory not in called]
        known = [trajectory for trajectory in free if trajectory.knows(conditioning)]
        if self._begun is not None and self._begun[1] is group and change is self._begun[2]:
            failed = self._begun[0].trajectory
            if failed in known or not known:
                group.ordered = True  # or the call after it, if the loop went on without the failed call
                return failed  # the last call failed, and this one repeats it
        index = len(called)
        by_order = group.trajectories[index] if index < len(group.trajectories) else None
        if by_order not in free:
            by_order = free[0] if free else None
        if known and by_order not in known:
            by_order = known[0]
        if by_order is None:
            shown = conditioning is not None and not any(trajectory.knows(conditioning) for trajectory in called)
            group.ordered = group.ordered or not shown
            return self._add_to(group)
        group.ordered = group.ordered or len(known) != 1
        return by_order

    def _compare_steps(self, group: _Group) -> None:
        """Note a step whose number of calls differs from that of the step before; called at the end of each step."""
        calls = len(group.called)
        if (
            self._schedule is not None
            and group.calls_of_last_step
            and calls != group.calls_of_last_step
            and group.ordered
        ):
            self.order_changed = self.order_changed or (group.calls_of_last_step, calls)
        group.calls_of_last_step, group.ordered = calls, False

    def _add_to(self, group: _Group) -> Trajectory:
        if self._resolved_calls is None and self._calls is not None:
            calls = self._calls if isinstance(self._calls, int) else self._calls()
            if calls < 1:
                raise ScheduleError(f"{calls} UNet calls were announced, but a generation has at least 1")
            self._resolved_calls = calls
        features = CachedFeatures(self._forecast)
        trajectory = Trajectory(self._trajectories, self._schedule, self._cut, self._resolved_calls, features)
        self._trajectories += 1
        group.trajectories.append(trajectory)
        return trajectory

    def _release(self, loop: tuple[Hashable, bool], group: _Group) -> None:
        self.steps_before[loop] = group.steps.steps
        for trajectory in group.trajectories:
            trajectory.release()
