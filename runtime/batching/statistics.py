"""What a worker counts, for its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal["full", "shallow"]


@dataclass(frozen=True)
class Total:
    """How often something happened, and how long it took altogether, in seconds."""

    count: int = 0
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Seconds each; 0 if it never happened."""
        return self.seconds / self.count if self.count else 0.0

    def plus(self, seconds: float) -> Total:
        return Total(self.count + 1, self.seconds + seconds)


@dataclass(frozen=True)
class Statistics:
    """A worker at one moment; counts are since it began.

    Attributes:
        healthy: whether the engines work; ``fault`` says why not.
        queued, in_flight: requests at present.
        slots, cache_bytes, cache_limit: of the cached features at present.
        ticks: engine calls by kind and number of rows (without padding), with the engines' own seconds.
        overhead: ticks with the seconds that they took beside the engine calls.
        gathers, gathers_skipped: shallow calls whose features were copied in, or were there already.
        queue_waits: from submission until work began.
        step_waits: of UNet calls, until their engine call began.
        requests: finished ones, from submission to end, by outcome: done, failed, cancelled, expired, fault.
        rejected: requests that were refused on submission.
    """

    healthy: bool = True
    fault: str | None = None
    queued: int = 0
    in_flight: int = 0
    slots: int = 0
    cache_bytes: int = 0
    cache_limit: int = 0
    ticks: Mapping[tuple[Kind, int], Total] = field(default_factory=dict)
    overhead: Total = Total()
    gathers: int = 0
    gathers_skipped: int = 0
    queue_waits: Total = Total()
    step_waits: Total = Total()
    requests: Mapping[str, Total] = field(default_factory=dict)
    rejected: int = 0

    @property
    def mean_rows(self) -> float:
        """Rows of an engine call, on average."""
        calls = sum(total.count for total in self.ticks.values())
        return sum(rows * total.count for (_, rows), total in self.ticks.items()) / calls if calls else 0.0
