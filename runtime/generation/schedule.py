"""Schedules: which UNet calls of a generation run the full graph, and which the shallow graph.

A schedule counts *calls* of the UNet, not timesteps: 4 steps of Heun are 7 calls, and img2img at strength 0.5 makes
half as many. Call 0 is always full.
"""

from __future__ import annotations

import itertools
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, ClassVar

from ...errors import ScheduleError

SKIP = "skip"
"""Cut of a skipped call. It runs no engine: its output is the previous call's output, corrected by the forecast.

A skipped call costs no time and has the largest error. ``offcut tune`` fits a correction of that error.
"""


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule(ABC):
    """Base class of schedules: a grid of full calls, and three modifiers that add full calls.

    Every shallow call costs some image quality. Each modifier recovers some of it at the cost of more full calls.

    Attributes:
        warmup: number of first calls that are full.
        cooldown: number of last calls that are full; above 0, the number of calls must be known.
        max_shallow: largest number of consecutive shallow calls; the call after them is full, and the grid stays.
    """

    warmup: int = 0
    cooldown: int = 0
    max_shallow: int | None = None

    kind: ClassVar[str]
    """First word of the text form, e.g. ``"uniform"``."""

    def __post_init__(self) -> None:
        self._check("warmup", least=0)
        self._check("cooldown", least=0)
        if self.max_shallow is not None:
            self._check("max_shallow", least=1)

    @property
    def needs_calls(self) -> bool:
        """Whether the number of calls must be known before the first one."""
        return self.cooldown > 0

    @property
    def cuts(self) -> tuple[str | None, ...]:
        """Cuts of shallow calls, each once, named as in ``UNet.cuts``; None is the cut given to ``set_schedule``."""
        return (None,)

    def cut_of(self, call: int) -> str | None:
        """Return the cut that a call has if it is shallow: one of ``cuts``."""
        return None

    def full_calls(self, calls: int) -> tuple[int, ...]:
        """Return the indices of the full calls in a generation of this many calls, in order.

        Raises:
            ScheduleError: ``calls`` is negative, or too small for the schedule.
        """
        calls = _integer("the number of calls", calls, least=0)
        return tuple(call for call in range(calls) if self.is_full(call, calls))

    def is_full(self, call: int, calls: int | None = None) -> bool:
        """Return whether this call (counted from 0) is full; calls beyond the number of calls are full.

        Args:
            call: the call's index.
            calls: number of calls; None where it is unknown, which only some schedules allow.

        Raises:
            ScheduleError: the schedule needs ``calls``.
        """
        warmup_or_cooldown = self._in_warmup_or_cooldown(call, calls)
        last_on_grid = self._last_on_grid(call, calls)  # first, since it raises if the schedule does not fit
        if warmup_or_cooldown:
            return True
        since = call - max(last_on_grid, self.warmup - 1)
        return since == 0 or (self.max_shallow is not None and since % (self.max_shallow + 1) == 0)

    @abstractmethod
    def _last_on_grid(self, call: int, calls: int | None) -> int:
        """Return the last call of the schedule's own grid up to and including this one."""

    def _in_warmup_or_cooldown(self, call: int, calls: int | None) -> bool:
        """Return whether a call belongs to the warm-up or the cooldown.

        Raises:
            ScheduleError: the schedule needs ``calls``.
        """
        if calls is None and self.needs_calls:
            raise ScheduleError(
                f"{self!r} needs to know how many UNet calls a generation has: make the pipeline with "
                "offcut.load or offcut.attach, or wrap a loop of your own in `with unet.generation(calls=n)`"
            )
        return call < self.warmup or (calls is not None and call >= calls - self.cooldown)

    def _check(self, name: str, *, least: int) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), least))

    def _arguments(self) -> tuple[Any, dict[str, Any]]:
        """Return the first argument, and the other arguments by name except defaults; modifiers come last."""
        first, *others = sorted(fields(self), key=lambda item: item.kw_only is True)
        values = {item.name: getattr(self, item.name) for item in others}
        changed = {item.name: values[item.name] for item in others if values[item.name] != item.default}
        return getattr(self, first.name), changed

    def __repr__(self) -> str:
        """Return the schedule as Python code: ``Uniform(5, warmup=2)``."""
        first, others = self._arguments()
        text = repr(list(first) if isinstance(first, tuple) else first)
        return f"{type(self).__name__}({', '.join([text, *(f'{key}={value!r}' for key, value in others.items())])})"

    def __str__(self) -> str:
        """Return the text form, which ``parse`` reads: ``uniform:5:warmup=2``."""
        first, others = self._arguments()
        return ":".join([self.kind, _text(first), *(f"{key}={_text(value)}" for key, value in others.items())])


@dataclass(frozen=True, repr=False)
class Uniform(Schedule):
    """Schedule that makes every ``interval``-th call full, as DeepCache does (arXiv 2312.00858, section 3.2).

    Without warm-up the full calls are the multiples of the interval. A warm-up moves the grid: the next full call comes
    ``interval`` calls after the last warm-up call.

    Attributes:
        interval: number of calls from one full call to the next.

    Examples:
        >>> Uniform(5).full_calls(20)
        (0, 5, 10, 15)
        >>> Uniform(5, warmup=3).full_calls(20)
        (0, 1, 2, 7, 12, 17)
    """

    interval: int
    kind: ClassVar[str] = "uniform"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("interval", least=1)

    def _last_on_grid(self, call: int, calls: int | None) -> int:
        return call - (call - max(self.warmup - 1, 0)) % self.interval


@dataclass(frozen=True, repr=False)
class Quad(Schedule):
    """DeepCache's non-uniform schedule: full calls are dense around one call and sparser further away from it.

    The number of full calls is that of ``Uniform(interval)``, ceil(calls / interval). With ``x`` the distance from the
    centre, full calls are evenly spaced in ``x ** (1 / power)`` (arXiv 2312.00858, section 3.3, and its released code).
    If two full calls coincide, the power is lowered in steps of 0.02 until all differ. For power 1, the limit, calls
    are evenly spaced.

    Attributes:
        interval: calls per full call, on average.
        center: call around which full calls are densest. 15 is the paper's choice for 50 steps. With None they are
            densest at the start, as in the paper's LDM experiments.
        power: exponent above 1; a larger one makes full calls sparser far from the centre. None for the paper's 1.4, or
            1.5 without a centre.

    Examples:
        >>> Quad(5).full_calls(50)
        (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)
    """

    interval: int
    center: int | None = 15
    power: float | None = None
    kind: ClassVar[str] = "quad"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("interval", least=1)
        if self.center is not None:
            self._check("center", least=0)
        if self.power is not None and not 1 < self.power <= 10:
            raise ScheduleError(f"power is {self.power}, but Quad needs one above 1 and at most 10, e.g. 1.4")

    @property
    def needs_calls(self) -> bool:
        return True

    def _last_on_grid(self, call: int, calls: int | None) -> int:
        assert calls is not None
        if self.center is not None and self.center >= calls:
            raise ScheduleError(
                f"{self!r} is centred on call {self.center}, but the generation has only {calls}: "
                "give a smaller center, or center=None"
            )
        power = self.power or (1.5 if self.center is None else 1.4)
        grid = _quad_grid(calls, -(-calls // self.interval), self.center or 0, power)
        return grid[bisect_right(grid, call) - 1]


@dataclass(frozen=True, repr=False)
class Steps(Schedule):
    """Schedule with explicit indices of full calls.

    Attributes:
        calls: indices of the full calls. 0 is always added; indices beyond the last call have no effect.

    Examples:
        >>> Steps([3, 9]).full_calls(8)
        (0, 3)
    """

    calls: Sequence[int]
    kind: ClassVar[str] = "steps"

    def __post_init__(self) -> None:
        super().__post_init__()
        calls = {0, *(_integer("a full call", call, least=0) for call in self.calls)}
        object.__setattr__(self, "calls", tuple(sorted(calls)))

    def _last_on_grid(self, call: int, calls: int | None) -> int:
        return self.calls[bisect_right(self.calls, call) - 1]


def parse(text: str, **modifiers: int | None) -> Schedule:
    """Return the schedule of a text such as ``"uniform:5"``, ``"quad:5:center=12"`` or ``"steps:0,3:warmup=2"``.

    Args:
        text: the form of ``str(schedule)``: the kind, its first parameter, and other parameters by name, separated by
            colons.
        modifiers: ``warmup``, ``cooldown`` and ``max_shallow`` that override the text; None keeps the text's value.

    Raises:
        ScheduleError: the text is not a schedule; the message shows the valid forms.
    """
    word, *rest = text.strip().split(":")
    kind = _KINDS.get(word.strip().lower())
    if kind is None or not rest:
        raise ScheduleError(f"{text!r} is not a schedule: write uniform:5, quad:5:center=15 or steps:0,3,9")
    known = {item.name: _READERS.get(item.name, int) for item in fields(kind)}
    first = next(item.name for item in fields(kind) if not item.kw_only)
    values: dict[str, Any] = {}
    for index, part in enumerate(rest):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = first if index == 0 else "", part
        name = name.strip().replace("-", "_")
        if name not in known:
            raise ScheduleError(f"{part!r} in {text!r} is not a parameter of {word}: it takes {', '.join(known)}")
        try:
            values[name] = known[name](value.strip())
        except ValueError as error:
            raise ScheduleError(f"{part!r} in {text!r} is not a number: write for example uniform:5") from error
    if first not in values:
        raise ScheduleError(f"{text!r} lacks its {first}: write for example uniform:5, quad:5 or steps:0,3,9")
    values.update({name: value for name, value in modifiers.items() if value is not None})
    return kind(**values)


def _optional(read: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text.lower() == "none" else read(text)


_KINDS: dict[str, type[Schedule]] = {schedule.kind: schedule for schedule in (Uniform, Quad, Steps)}
_READERS: dict[str, Callable[[str], Any]] = {
    "max_shallow": _optional(int),
    "center": _optional(int),
    "power": _optional(float),
    "calls": lambda text: [int(call) for call in text.split(",")],
}


def _text(value: Any) -> str:
    """Return the text of an argument: ``3``, ``none`` or ``0,3,9``."""
    return ",".join(map(_text, value)) if isinstance(value, tuple) else str(value).lower()


def _integer(name: str, value: Any, least: int) -> int:
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError as error:
        raise ScheduleError(f"{name} is {value!r}, but must be an integer of at least {least}") from error
    if number < least:
        raise ScheduleError(f"{name} is {number}, but must be at least {least}")
    return number


@lru_cache(maxsize=64)
def _quad_grid(calls: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """Return ``count`` distinct calls below ``calls``, of which 0 is the first: see ``Quad``."""
    for step in itertools.count():
        lowered = power - 0.02 * step
        if lowered < 1 + 1e-6:
            break
        grid = _quad_points(calls, count, center, lowered)
        if all(earlier < later for earlier, later in itertools.pairwise((*grid, calls))):
            return grid
    return tuple(index * calls // count for index in range(count))


def _quad_points(calls: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """Return the full calls for one power; some of them may coincide.

    Left of the centre the base is negative, so its fractional power is complex. As in the paper's released code, the
    points lie on a straight line in the complex plane, are raised to the power, and their real part counts.
    """
    start = complex(-center) ** (1 / power)
    stop = complex(calls - center) ** (1 / power)
    line = (start + (stop - start) * index / count for index in range(1, count))
    return (0, *(_truncate((point**power).real) + center for point in line))


def _truncate(value: float) -> int:
    """Round towards zero, or to an integer within rounding error, so that all platforms agree."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 else int(value)
