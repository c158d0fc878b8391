"""Counts and times of engine calls."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from .lanes import Lane
from .statistics import Kind, Statistics, Total


class TickLog:
    """What a batcher writes down; read from any thread.

    On a GPU a call's time is read from events once the device has passed them: nobody waits for it.

    Args:
        device: where the engines run.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._open: deque[tuple[Any, Any, Callable[[float], None]]] = deque()
        self._lock = threading.Lock()
        self._ticks: dict[tuple[Kind, int], Total] = {}
        self._overhead = Total()
        self._engine_seconds = 0.0
        self._step_waits = Total()
        self._gathers = self._skipped = 0

    @contextmanager
    def call(self, lane: Lane, cut: str | None, size: int, rows: int, gathered: bool | None = None) -> Iterator[None]:
        """Around an engine call.

        Args:
            size, rows: of the batch with padding and without.
            gathered: whether its features had to be copied in; None for a full call.
        """
        begin, host = self._mark(), time.perf_counter()
        yield
        end = self._mark()
        self._engine_seconds = time.perf_counter() - host
        with self._lock:
            self._gathers += gathered is True
            self._skipped += gathered is False

        def took(seconds: float) -> None:
            lane.took(cut, size, seconds)
            kind: Kind = "full" if cut is None else "shallow"
            with self._lock:
                self._ticks[kind, rows] = self._ticks.get((kind, rows), Total()).plus(seconds)

        if self._cuda:
            self._open.append((begin, end, took))
            while self._open and self._open[0][1].query():
                first, last, tell = self._open.popleft()
                tell(first.elapsed_time(last) / 1000)
        else:
            took(end - begin)

    def tick(self, seconds: float, waits: Sequence[float]) -> None:
        """A whole tick of so many seconds on the host is over; its members had waited so long before."""
        with self._lock:
            self._overhead = self._overhead.plus(seconds - self._engine_seconds)
            for wait in waits:
                self._step_waits = self._step_waits.plus(wait)

    def fill(self, statistics: Statistics) -> Statistics:
        """The same with what was counted here."""
        with self._lock:
            return replace(
                statistics,
                ticks=dict(self._ticks),
                overhead=self._overhead,
                gathers=self._gathers,
                gathers_skipped=self._skipped,
                step_waits=self._step_waits,
            )

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
