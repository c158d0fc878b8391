"""Observation of a server under load: its memory, and the gauges of its ``/metrics``."""

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
class MemorySample:
    """One observation of a server.

    Attributes:
        at: reading of ``time.perf_counter``.
        resident: resident memory of the process in bytes.
        gauges: values of the gauges by name: requests that wait, that run, and that hold cached features.
    """

    at: float
    resident: int
    gauges: Mapping[str, float]


class ServerMonitor:
    """A thread that observes a server at intervals, while its context is open.

    Args:
        url, pid: URL and process id of the server.
        interval: seconds between samples.
        on_sample: called in the thread with each sample.
    """

    def __init__(
        self, url: str, pid: int, interval: float, on_sample: Callable[[MemorySample], None] = lambda sample: None
    ) -> None:
        import psutil

        self.samples: list[MemorySample] = []
        self._url, self._interval, self._on_sample = url, interval, on_sample
        self._process = psutil.Process(pid)
        self._over = threading.Event()
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._observe, name="server-monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._over.set()
        self._thread.join()
        if self._error is not None and raised[0] is None:
            raise InternalError(f"the server's metrics could not be read: {self._error}") from self._error

    def most(self, *names: str) -> int:
        """Return the largest sum of these gauges in any sample."""
        return int(max((sum(sample.gauges[name] for name in names) for sample in self.samples), default=0))

    def _observe(self) -> None:
        try:
            while not self._over.wait(self._interval):
                text = read(f"{self._url}/metrics")
                sample = MemorySample(time.perf_counter(), self._process.memory_info().rss, gauges(text))
                self.samples.append(sample)
                self._on_sample(sample)
        except Exception as error:  # `__exit__` raises it
            self._error = error


def read(url: str) -> str:
    """Return the text at a URL."""
    with urllib.request.urlopen(url, timeout=60) as reply:
        return str(reply.read().decode())


def gauges(text: str) -> dict[str, float]:
    """Return the three gauges from text in Prometheus' format."""
    lines = (line.split() for line in text.splitlines() if line and not line.startswith("#"))
    return {line[0]: float(line[1]) for line in lines if line[0] in (QUEUED, IN_FLIGHT, SLOTS)}


def growth(samples: Sequence[MemorySample], warm_up: float) -> tuple[int, int]:
    """Return the median bytes of the first tenth of the samples after the warm-up, and of the last tenth.

    Args:
        warm_up: share of the samples that the warm-up takes, from 0 to 1.
    """
    counted = [sample.resident for sample in samples][int(len(samples) * warm_up) :]
    tenth = max(len(counted) // 10, 1)
    return int(statistics.median(counted[:tenth])), int(statistics.median(counted[-tenth:]))
