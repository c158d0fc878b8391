"""Looking at a server from outside while it is under load: its memory, and the gauges of its ``/metrics``."""

from __future__ import annotations

import statistics
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from ...errors import InternalError

QUEUED, IN_FLIGHT, SLOTS = "offcut_queued_requests", "offcut_in_flight_requests", "offcut_cache_slots"


@dataclass(frozen=True)
class Look:
    """One look.

    Attributes:
        at: on ``time.perf_counter``.
        resident: bytes of the process in memory.
        gauges: by their names: requests that wait, that are worked on, and that keep cached features.
    """

    at: float
    resident: int
    gauges: Mapping[str, float]


class Watch:
    """Looks again and again in a thread, while its context lasts.

    Args:
        url, pid: of the server.
        every: seconds between looks.
        told: is told of each, in the thread.
    """

    def __init__(self, url: str, pid: int, every: float, told: Callable[[Look], None] = lambda look: None) -> None:
        import psutil

        self.looks: list[Look] = []
        self._url, self._every, self._told = url, every, told
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._work, name="watch", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and raised[0] is None:
            raise InternalError(f"the server's metrics could not be read: {self._error}") from self._error

    def most(self, *names: str) -> int:
        """The largest sum of these gauges that was seen."""
        return int(max((sum(look.gauges[name] for name in names) for look in self.looks), default=0))

    def _work(self) -> None:
        try:
            while not self._over.wait(self._every):
                text = read(f"{self._url}/metrics")
                self.looks.append(Look(time.perf_counter(), self._process.memory_info().rss, gauges(text)))
                self._told(self.looks[-1])
        except Exception as error:  # told at the end of the context
            self._error = error


def read(url: str) -> str:
    """What a server says there."""
    with urllib.request.urlopen(url, timeout=60) as reply:
        return str(reply.read().decode())


def gauges(text: str) -> dict[str, float]:
    """Those of Prometheus' text format that matter here."""
    lines = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {line[0]: float(line[1]) for line in lines if line[0] in (QUEUED, IN_FLIGHT, SLOTS)}


@dataclass(frozen=True)
class Growth:
    """How much more memory a process held at the end than after its warm-up, each the median of some looks.

    Attributes:
        first, last: bytes.
        most: the largest that was seen.
    """

    first: int
    last: int
    most: int

    @property
    def bytes(self) -> int:
        return self.last - self.first


def growth(looks: Sequence[Look], warm_up: float) -> Growth:
    """Of the looks after a first share, 0..1, that is left out: their last tenth against their first one."""
    kept = [look.resident for look in looks][int(len(looks) * warm_up) :]
    tenth = max(len(kept) // 10, 1)
    return Growth(
        first=int(statistics.median(kept[:tenth])),
        last=int(statistics.median(kept[-tenth:])),
        most=max(look.resident for look in looks),
    )
