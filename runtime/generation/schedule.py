"""Schedules: which UNet calls of a generation run the full graph, and which the shallow one.

A schedule counts *calls* of the UNet, not timesteps: 4 steps of Heun are 7 calls, and img2img at strength 0.5 makes
half as many. Call 0 is always full.
"""

from __future__ import annotations

import itertools
import math
import operator
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any, ClassVar

from ...errors import ScheduleError

SKIP = "skip"
"""The cut of a call that runs no engine: its answer is that of the call before, as a forecast corrects it.

It costs nothing and misses more than any other. ``offcut tune`` fits what makes up for it.
"""


@dataclass(frozen=True, kw_only=True, repr=False)
class Schedule(ABC):
    """What all schedules have in common: their own grid of full calls, and three modifiers, each of which only adds.

    Every shallow call costs some quality; each modifier buys some of it back.

    Attributes:
        warmup: this many first calls are full.
        cooldown: this many last calls are full. The number of calls has to be known for it.
        max_shallow: after this many shallow calls in a row comes a full one; the grid stays where it is.
    """

    warmup: int = 0
    cooldown: int = 0
    max_shallow: int | None = None

    kind: ClassVar[str]
    """The first word of the text form, e.g. ``"uniform"``."""
    adaptive: ClassVar[bool] = False
    """Whether full calls are chosen as the generation goes, so that nobody knows them before."""

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
        """The cuts of its shallow calls, each once, as ``UNet.cuts`` has them; None is the one it is set with."""
        return (None,)

    def cut_of(self, call: int) -> str | None:
        """The cut of a call if it is shallow: one of ``cuts``."""
        return None

    def full_calls(self, calls: int) -> tuple[int, ...]:
        """The indices of the full calls in a generation of so many calls, in order.

        Raises:
            ScheduleError: ``calls`` is negative, or the schedule does not fit so few.
        """
        calls = _integer("the number of calls", calls, least=0)
        return tuple(call for call in range(calls) if self.is_full(call, calls))

    def is_full(self, call: int, calls: int | None = None) -> bool:
        """Whether this call (counted from 0) is full. Calls beyond the number of calls are.

        Args:
            call: the call's index.
            calls: how many there will be; None where nobody knows, if the schedule can do without.

        Raises:
            ScheduleError: the schedule needs ``calls``.
        """
        at_an_end = self._at_an_end(call, calls)
        last_on_grid = self._last_on_grid(call, calls)  # first, so that what does not fit fails at the first call
        if at_an_end:
            return True
        since = call - max(last_on_grid, self.warmup - 1)
        return since == 0 or (self.max_shallow is not None and since % (self.max_shallow + 1) == 0)

    @abstractmethod
    def _last_on_grid(self, call: int, calls: int | None) -> int:
        """The last call of the schedule's own grid that is not after this one."""

    def _at_an_end(self, call: int, calls: int | None) -> bool:
        """Whether a call is of the warm-up or the cooldown.

        Raises:
            ScheduleError: the schedule needs ``calls``.
        """
        if calls is None and self.needs_calls:
            raise ScheduleError(
                f"{self!r} needs to know how many UNet calls a generation has, and nobody said: make the pipeline with "
                "offcut.load or offcut.attach, or wrap a loop of your own in `with unet.generation(calls=n)`"
            )
        return call < self.warmup or (calls is not None and call >= calls - self.cooldown)

    def _check(self, name: str, *, least: int) -> None:
        object.__setattr__(self, name, _integer(name, getattr(self, name), least))

    def _arguments(self) -> tuple[Any, dict[str, Any]]:
        """The first argument, and by name the others that differ from their defaults, the schedule's own ones first."""
        own = sorted(fields(self), key=lambda each: each.kw_only is True)
        others = {each.name: getattr(self, each.name) for each in own[1:]}
        changed = {each.name: others[each.name] for each in own[1:] if others[each.name] != each.default}
        return getattr(self, own[0].name), changed

    def __repr__(self) -> str:
        """As one would write it: ``Uniform(5, warmup=2)``."""
        first, others = self._arguments()
        text = repr(list(first) if isinstance(first, tuple) else first)
        return f"{type(self).__name__}({', '.join([text, *(f'{key}={value!r}' for key, value in others.items())])})"

    def __str__(self) -> str:
        """For tables, and as ``parse`` reads it: ``uniform:5:warmup=2``."""
        first, others = self._arguments()
        return ":".join([self.kind, _text(first), *(f"{key}={_text(value)}" for key, value in others.items())])


@dataclass(frozen=True, repr=False)
class Uniform(Schedule):
    """Every ``interval``-th call is full: DeepCache's plug-in schedule (arXiv 2312.00858, section 3.2).

    Without warm-up these are DeepCache's multiples of the interval. A warm-up moves the grid: the last warm-up call
    is full anyway, so the next full call comes ``interval`` calls after it, and none is spent right behind another.

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
    """The paper's non-uniform schedule: full calls are dense around one call and thin out from there by a power.

    As many full calls as ``Uniform(interval)`` would make, ceil(calls / interval), placed where a straight line through
    ``x ** (1 / power)`` says (arXiv 2312.00858, section 3.3 and the code released with it). Where two of them fall
    together, the power is lowered by 0.02 until none do, which ends at the latest with evenly spaced calls, the limit
    for power 1.

    >>> Quad(5).full_calls(50)
    (0, 5, 9, 13, 17, 21, 26, 31, 37, 43)

    Attributes:
        interval: calls per full call, on average.
        center: the call around which full calls are densest; None for the paper's form without a centre (its LDM
            experiments), which is densest at the start. 15 is the paper's choice for 50 steps.
        power: how fast they thin out, above 1; None for the paper's 1.4, or 1.5 without a centre.
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
    """Explicit indices of full calls; 0 is added where it is missing, those beyond a generation's end have no effect.

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


@dataclass(frozen=True, repr=False)
class Adaptive(Schedule):
    """A call is full where reuse of the features would miss more than a bound, foretold as ``probe`` describes.

    What the same bound costs depends on sampler and number of steps: features of an ancestral sampler move several
    times as far from one call to the next. Where these are known before, a schedule of ``offcut tune`` is better.

    >>> Adaptive(0.3, max_shallow=6)
    Adaptive(0.3, max_shallow=6)

    Attributes:
        bound: of the error, relative to the features' size; the larger, the fewer full calls.
        least: so many calls after a full one are shallow in any case, 1 or more: the first cannot be foretold.
        warmup: two full calls are needed before anything can be foretold.
        max_shallow: the most shallow calls in a row, whatever is foretold.
    """

    bound: float
    least: int = 1
    warmup: int = field(default=2, kw_only=True)
    max_shallow: int | None = field(default=8, kw_only=True)
    kind: ClassVar[str] = "adaptive"
    adaptive: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("least", least=1)
        if isinstance(self.bound, bool) or not isinstance(self.bound, int | float) or not 0 < self.bound < math.inf:
            raise ScheduleError(f"bound is {self.bound!r}, but Adaptive needs one above 0, e.g. 0.2")
        if self.max_shallow is not None and self.max_shallow < self.least:
            raise ScheduleError(f"max_shallow is {self.max_shallow}, below least, {self.least}: give at least that")

    def decide(self, call: int, calls: int | None, last: int | None, missed: Callable[[], float | None]) -> bool:
        """Whether this call is full.

        Args:
            call: the call's index.
            calls: how many there will be; None where nobody knows.
            last: the last full call; None where there was none.
            missed: what the call would miss if it were shallow; None where nobody can say. Asked only if it matters.

        Raises:
            ScheduleError: it has to know the number of calls, and nobody does.
        """
        if self._at_an_end(call, calls) or last is None:
            return True
        shallow = call - last - 1
        if self.max_shallow is not None and shallow >= self.max_shallow:
            return True
        if shallow < self.least:
            return False
        error = missed()
        return error is None or not error <= self.bound  # one that is no number is full

    def _last_on_grid(self, call: int, calls: int | None) -> int:
        """Nobody knows before the generation; see ``decide``."""
        raise ScheduleError(
            f"{self!r} chooses its full calls as the image is made, so that nobody knows them before: "
            "this needs another schedule, such as Uniform(5, warmup=2)"
        )


def parse(text: str, **modifiers: int | None) -> Schedule:
    """The schedule that a text stands for, such as ``"uniform:5"``, ``"quad:5:center=12"`` or ``"steps:0,3:warmup=2"``.

    Args:
        text: the kind, its first parameter, and others by name, separated by colons: the form of ``str(schedule)``.
        modifiers: ``warmup``, ``cooldown``, ``max_shallow`` given beside the text; None leaves what the text says.

    Raises:
        ScheduleError: it cannot be read; the message says what can.
    """
    word, *rest = text.strip().split(":")
    kind = _KINDS.get(word.strip().lower())
    if kind is None or not rest:
        raise ScheduleError(
            f"{text!r} is not a schedule: write uniform:5, quad:5:center=15, steps:0,3,9 or adaptive:0.2"
        )
    known = {each.name: _READERS.get(each.name, int) for each in fields(kind)}
    first = next(each.name for each in fields(kind) if not each.kw_only)
    values: dict[str, Any] = {}
    for index, part in enumerate(rest):
        name, equals, value = part.partition("=")
        if not equals:
            name, value = first if index == 0 else "", part
        name = name.strip().replace("-", "_")
        if name not in known:
            raise ScheduleError(f"{part!r} in {text!r} means nothing to {word}: it takes {', '.join(known)}")
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


_KINDS: dict[str, type[Schedule]] = {schedule.kind: schedule for schedule in (Uniform, Quad, Steps, Adaptive)}
_READERS: dict[str, Callable[[str], Any]] = {
    "max_shallow": _optional(int),
    "center": _optional(int),
    "power": _optional(float),
    "bound": float,
    "calls": lambda text: [int(call) for call in text.split(",")],
}


def _text(value: Any) -> str:
    """Of an argument: ``3``, ``none`` or ``0,3,9``."""
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
    """``count`` distinct calls below ``calls``, 0 among them: see ``Quad``."""
    for step in itertools.count():
        lowered = power - 0.02 * step
        if lowered < 1 + 1e-6:
            break
        grid = _quad_points(calls, count, center, lowered)
        if all(earlier < later for earlier, later in itertools.pairwise((*grid, calls))):
            return grid
    return tuple(index * calls // count for index in range(count))


def _quad_points(calls: int, count: int, center: int, power: float) -> tuple[int, ...]:
    """The paper's recipe for one power; the points may coincide.

    Left of the centre the base is negative, so that its fractional power is complex. The released code takes a straight
    line through the complex plane, raises it to the power again, and keeps the real part; so does this.
    """
    start = complex(-center) ** (1 / power)
    stop = complex(calls - center) ** (1 / power)
    line = (start + (stop - start) * index / count for index in range(1, count))
    return (0, *(_truncate((point**power).real) + center for point in line))


def _truncate(value: float) -> int:
    """Towards zero; what lies within rounding error of an integer is that one, so that platforms agree on schedules."""
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 else int(value)
