"""The choice of the requests that share the next engine call: a pure function, for the worker and for its simulator.

The call belongs to the request that is due first. All requests of the same lane whose next step is of the same kind
(full, or shallow at the same cut) join it while there is room.

No request starves: a request that ``bound`` engine calls have passed over leads the next call, the longest waiting
first. With n requests in flight, no request is passed over more than ``bound + n - 1`` times.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ...errors import UserError


@dataclass(frozen=True)
class WaitingCall:
    """UNet call that waits for the engines.

    Attributes:
        key: number of the request, in order of submission.
        lane: number of the lane; calls of one lane have inputs of the same shapes and can share an engine call.
        cut: cut of a shallow call; None for a full call.
        rows: batch size of the inputs; with guidance, two rows for each image.
        due: time at which the request is due, in seconds, on a clock that all calls share.
        passed_over: number of engine calls made while this call waited.
    """

    key: int
    lane: int
    cut: str | None
    rows: int
    due: float
    passed_over: int = 0


@dataclass(frozen=True)
class Pick:
    """The next engine call.

    Attributes:
        lane: lane of all its members.
        cut: cut of a shallow call; None for a full call.
        members: keys of the requests, in the order of their rows.
    """

    lane: int
    cut: str | None
    members: tuple[int, ...]


@dataclass(frozen=True)
class Policy:
    """Earliest deadline first, with bounded waiting. It has no clock and no state.

    Attributes:
        bound: number of engine calls that may pass over a request before the request leads the next one.

    Raises:
        UserError: the bound is below 1.
    """

    bound: int = 16

    def __post_init__(self) -> None:
        if self.bound < 1:
            raise UserError(f"a policy's bound is a number of engine calls, at least 1, not {self.bound}")

    def choose(self, waiting: Sequence[WaitingCall], limits: Mapping[int, int]) -> Pick:
        """Return the next engine call.

        Args:
            waiting: the calls to choose from, at least one.
            limits: largest number of rows of an engine call, by lane; a call with more rows runs alone.
        """
        starved = [call for call in waiting if call.passed_over >= self.bound]
        if starved:
            leader = max(starved, key=lambda call: (call.passed_over, -call.due, -call.key))
        else:
            leader = min(waiting, key=lambda call: (call.due, call.key))
        candidates = [call for call in waiting if (call.lane, call.cut) == (leader.lane, leader.cut)]
        members, rows = [leader.key], leader.rows
        for call in sorted((call for call in candidates if call is not leader), key=self._join_order):
            if rows + call.rows <= limits[leader.lane]:
                members.append(call.key)
                rows += call.rows
        # Sorted by key: if the members stay the same, their features stay in place in the buffers.
        return Pick(leader.lane, leader.cut, tuple(sorted(members)))

    def _join_order(self, call: WaitingCall) -> tuple[int, float, int]:
        """Sort key of the calls that may join: starved ones first, then by deadline."""
        return (-call.passed_over if call.passed_over >= self.bound else 0, call.due, call.key)
