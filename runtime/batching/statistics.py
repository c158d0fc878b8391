"""Counts and times of a worker and its engine calls, for metrics."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

CallKind = Literal["full", "shallow"]


@dataclass(frozen=True)
class Total:
    """Number of events and their total duration in seconds."""

    count: int = 0
    seconds: float = 0.0

    @property
    def mean(self) -> float:
        """Mean duration in seconds; 0 without events."""
        return self.seconds / self.count if self.count else 0.0

    def plus(self, seconds: float) -> Total:
        """Return the total with one more event of this duration."""
        return Total(self.count + 1, self.seconds + seconds)


@dataclass(frozen=True)
class Statistics:
    """Snapshot of a worker; counts start when the worker does.

    Attributes:
        healthy: whether the engines work; ``fault`` says why they do not.
        queued, in_flight: current number of requests.
        slots: number of trajectories that hold cached features; most requests have one trajectory.
        cache_bytes, cache_limit: bytes of the cached features, and the most that they may take.
        ticks: engine calls by kind and number of rows (without padding), with the time inside the engines.
        overhead: engine calls, with the time that the engine thread spent on each outside the engines.
        gathers, gathers_skipped: shallow calls whose features were copied into the buffers, or were already there.
        queue_waits: started requests, with the time from submission to start.
        step_waits: UNet calls, with the time that each waited for its engine call.
        requests: finished requests by outcome (done, failed, cancelled, expired, fault), with the time from
            submission to end.
        rejected: requests that were refused on submission.
    """

    healthy: bool = True
    fault: str | None = None
    queued: int = 0
    in_flight: int = 0
    slots: int = 0
    cache_bytes: int = 0
    cache_limit: int = 0
    ticks: Mapping[tuple[CallKind, int], Total] = field(default_factory=dict)
    overhead: Total = Total()
    gathers: int = 0
    gathers_skipped: int = 0
    queue_waits: Total = Total()
    step_waits: Total = Total()
    requests: Mapping[str, Total] = field(default_factory=dict)
    rejected: int = 0

    @property
    def mean_rows(self) -> float:
        """Mean number of rows of an engine call."""
        calls = sum(total.count for total in self.ticks.values())
        return sum(rows * total.count for (_, rows), total in self.ticks.items()) / calls if calls else 0.0


class CallLog:
    """Counts and times of engine calls. The engine thread writes them; any thread may read them.

    On a GPU, events measure the time. They are read when the device has passed them, so no thread waits for it.

    Args:
        cuda: whether the engines run on a GPU.
    """

    def __init__(self, cuda: bool) -> None:
        self._cuda = cuda
        self._pending: deque[tuple[Any, Any, Callable[[float], None]]] = (
            deque()
        )  # begin, end, function that takes the seconds
        self._lock = threading.Lock()
        self._ticks: dict[tuple[CallKind, int], Total] = {}
        self._overhead = Total()
        self._engine_seconds = 0.0
        self._step_waits = Total()
        self._gathers = self._gathers_skipped = 0

    @contextmanager
    def engine_call(self, cut: str | None, rows: int, gathered: bool | None = None) -> Iterator[None]:
        """Count and time the engine call made in this block.

        Args:
            cut: cut of a shallow call; None for a full call.
            rows: number of rows without padding.
            gathered: whether the features had to be copied in; None for a full call.
        """
        begin, host_begin = self._now(), time.perf_counter()
        yield
        end = self._now()
        self._engine_seconds = time.perf_counter() - host_begin
        with self._lock:
            self._gathers += gathered is True
            self._gathers_skipped += gathered is False

        def add_seconds(seconds: float) -> None:
            kind: CallKind = "full" if cut is None else "shallow"
            with self._lock:
                self._ticks[kind, rows] = self._ticks.get((kind, rows), Total()).plus(seconds)

        if self._cuda:
            self._pending.append((begin, end, add_seconds))
            while self._pending and self._pending[0][1].query():
                earlier_begin, earlier_end, add_earlier = self._pending.popleft()
                add_earlier(earlier_begin.elapsed_time(earlier_end) / 1000)
        else:
            add_seconds(end - begin)

    def add_call(self, seconds: float, waits: Sequence[float]) -> None:
        """Add a finished engine call: its time on the host, and the time that each of its members had waited."""
        with self._lock:
            self._overhead = self._overhead.plus(seconds - self._engine_seconds)
            for wait in waits:
                self._step_waits = self._step_waits.plus(wait)

    def fill(self, statistics: Statistics) -> Statistics:
        """Return the statistics with the counts and times of this log."""
        with self._lock:
            return replace(
                statistics,
                ticks=dict(self._ticks),
                overhead=self._overhead,
                gathers=self._gathers,
                gathers_skipped=self._gathers_skipped,
                step_waits=self._step_waits,
            )

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        import torch

        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
