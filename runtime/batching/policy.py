"""Which requests share the next engine call: small pure functions, the same for the worker and for its simulator.

A policy sees the requests that stand at the UNet and picks some of one lane, all at a full step or all at a shallow
step of one cut. It has no clock and no state, so the same view always gives the same pick.

No request starves: one that ``bound`` engine calls have passed over leads the next one, the longest waiting first.
New calls begin with none, so with n requests in flight none is passed over more than ``bound + n - 1`` times.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import UserError
from .times import StepTimes


@dataclass(frozen=True)
class Waiting:
    """A request that stands at the UNet.

    Attributes:
        key: the request's number, in the order of submission.
        lane: requests of one lane have inputs of the same shapes, and can share calls.
        cut: of the shallow step that comes next; None if it is full.
        rows: of its inputs' batch: with guidance two for each image.
        due: when its result is wanted, in seconds on any clock that is the same for all.
        passed: engine calls that went by since it came to stand here.
        until_full: shallow steps, this one included, before its next full one; None if no full one follows.
    """

    key: int
    lane: int
    cut: str | None
    rows: int
    due: float
    passed: int = 0
    until_full: int | None = None


@dataclass(frozen=True)
class View:
    """All that a policy knows.

    Attributes:
        waiting: at least one.
        limits: the most rows that an engine call takes, by lane; a request with more gets calls of its own.
        times: how long calls take, by lane, as far as that was measured.
    """

    waiting: tuple[Waiting, ...]
    limits: Mapping[int, int]
    times: Mapping[int, StepTimes] = field(default_factory=dict)


@dataclass(frozen=True)
class Pick:
    """The next engine call.

    Attributes:
        lane: of all its members.
        cut: of the shallow call; None for a full one.
        members: the requests by their keys, in the order of their rows.
    """

    lane: int
    cut: str | None
    members: tuple[int, ...]


@dataclass(frozen=True)
class Policy(ABC):
    """See the module.

    Attributes:
        bound: a request that so many engine calls have passed over leads the next one.
    """

    bound: int = 16

    def __post_init__(self) -> None:
        if self.bound < 1:
            raise UserError(f"a policy's bound is a number of engine calls, at least 1, not {self.bound}")

    def choose(self, view: View) -> Pick:
        """The engine call that comes next."""
        late = [each for each in view.waiting if each.passed >= self.bound]
        leader = max(late, key=lambda each: (each.passed, -each.due, -each.key)) if late else self._leader(view)
        group = [each for each in view.waiting if (each.lane, each.cut) == (leader.lane, leader.cut)]
        others = sorted((each for each in group if each is not leader), key=self._order)
        members, rows = [leader.key], leader.rows
        for each in others:
            if rows + each.rows <= view.limits[leader.lane]:
                members.append(each.key)
                rows += each.rows
        # In the order of their keys, so that the same members find their features where they left them.
        return Pick(leader.lane, leader.cut, tuple(sorted(members)))

    @abstractmethod
    def _leader(self, view: View) -> Waiting:
        """The request whose kind of step comes next, if none has waited too long."""

    def _order(self, each: Waiting) -> tuple[int, float, int]:
        """Who comes along first: those who have waited too long, then by deadline."""
        return (-each.passed if each.passed >= self.bound else 0, each.due, each.key)


@dataclass(frozen=True)
class Deadline(Policy):
    """The request that is due first goes on, and all that stand at the same kind of step go with it."""

    def _leader(self, view: View) -> Waiting:
        return _first_due(view.waiting)


@dataclass(frozen=True)
class Largest(Policy):
    """The kind of step at which the most rows wait; among equals that of the request which is due first."""

    def _leader(self, view: View) -> Waiting:
        first = _first_due(view.waiting)

        def size(each: Waiting) -> tuple[int, bool, float, int]:
            group = [other for other in view.waiting if (other.lane, other.cut) == (each.lane, each.cut)]
            rows = min(sum(other.rows for other in group), view.limits[each.lane])
            return rows, (each.lane, each.cut) == (first.lane, first.cut), -each.due, -each.key

        return max(view.waiting, key=size)


@dataclass(frozen=True)
class Aligned(Policy):
    """In the lane of the request that is due first, full steps wait for others to come to theirs, if that saves time.

    With F at a full step and S at a shallow one, of which some come to a full step after k more shallow ones: a full
    call for both saves ``t_full(F) + t_full(S) - t_full(F + S)`` for everybody in the lane, and costs those at the full
    step ``k * t_shallow(S)``. Without measured times the request that is due first goes on.
    """

    def _leader(self, view: View) -> Waiting:
        first = _first_due(view.waiting)
        lane = [each for each in view.waiting if each.lane == first.lane]
        full = [each for each in lane if each.cut is None]
        shallow = _most_rows(lane)
        times = view.times.get(first.lane)
        if not full or not shallow or times is None or not (times.knows(None) and times.knows(shallow[0].cut)):
            return first
        return _first_due(shallow if _worth_holding(full, shallow, times, view.limits[first.lane]) else full)


def _worth_holding(full: Sequence[Waiting], shallow: Sequence[Waiting], times: StepTimes, limit: int) -> bool:
    steps = [each.until_full for each in shallow if each.until_full is not None]
    if not steps:
        return False
    held, joining = _rows(full), _rows([each for each in shallow if each.until_full == min(steps)])
    if held + joining > limit:
        return False
    saved = times.seconds(None, held) + times.seconds(None, joining) - times.seconds(None, held + joining)
    delay = min(steps) * times.seconds(shallow[0].cut, min(_rows(shallow), limit))
    return saved * (len(full) + len(shallow)) > delay * len(full)


def _most_rows(lane: Sequence[Waiting]) -> list[Waiting]:
    """Those at a shallow step of the cut that most rows wait at; empty if nobody is at one."""
    groups: dict[str, list[Waiting]] = {}
    for each in lane:
        if each.cut is not None:
            groups.setdefault(each.cut, []).append(each)
    return max(groups.values(), key=lambda group: (_rows(group), -_first_due(group).key), default=[])


def _rows(group: Sequence[Waiting]) -> int:
    return sum(each.rows for each in group)


def _first_due(waiting: Sequence[Waiting]) -> Waiting:
    return min(waiting, key=lambda each: (each.due, each.key))


POLICIES: dict[str, type[Policy]] = {"deadline": Deadline, "largest": Largest, "aligned": Aligned}
"""By name."""


def policy_of(name: str, bound: int | None = None) -> Policy:
    """A policy by its name in ``POLICIES``.

    Raises:
        UserError: there is none of this name.
    """
    if name not in POLICIES:
        raise UserError(f"there is no policy {name!r}: choose {', '.join(POLICIES)}")
    return POLICIES[name]() if bound is None else POLICIES[name](bound)
