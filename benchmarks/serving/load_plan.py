"""The settings of a load test: its servers and its phases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from ..schema.serving import Way

PARTS = ("load", "overload", "soak")


@dataclass(frozen=True)
class ServerSetting:
    """The settings of the measured servers.

    Attributes:
        bundle: the bundle to serve.
        steps, interval, warmup, guidance: defaults for requests that do not set them.
        size: side of the images in pixels; None for the model's own.
        in_flight: maximum number of requests that run at the same time, or in one batch of whole requests.
        queue: maximum number of waiting requests.
        rows: maximum number of rows in an engine call.
    """

    bundle: Path = Path()
    steps: int = 20
    interval: int = 3
    warmup: int = 2
    guidance: float = 3.0
    size: int | None = None
    in_flight: int = 8
    queue: int = 16
    rows: int = 16
    engine: str = "auto"
    device: str = "cpu"
    threads: int | None = None

    @property
    def places(self) -> int:
        """Number of requests that run or wait in the server; the same for all ways to batch."""
        return self.in_flight + self.queue


@dataclass(frozen=True)
class LoadPlan:
    """The phases of a load test, with durations in seconds.

    Attributes:
        parts: names in ``PARTS``.
        clients: numbers of clients of the closed loops.
        loads: rates of the open loops, as shares of the capacity.
        rounds: number of rounds in which the ways to batch take turns.
        closed, open: duration of the window of a closed and of an open loop.
        settle: duration before each window.
        times: rate under overload, as a multiple of the capacity.
        capacity: duration of the window with every place taken, which comes before the overload.
        overload: duration of the overload.
        soak, control: duration of the soak, and of a soak on a server that leaks memory on purpose.
        soak_clients: number of clients of both soaks.
        leaving: share of the soaks' requests whose client disconnects.
        leak: bytes that the leaking server keeps at each request.
    """

    parts: tuple[str, ...] = PARTS
    clients: tuple[int, ...] = (1, 4, 16)
    loads: tuple[float, ...] = (0.7, 0.9)
    rounds: int = 3
    closed: float = 20.0
    open: float = 60.0
    settle: float = 4.0
    times: float = 10.0
    overload: float = 120.0
    capacity: float = 60.0
    soak: float = 1200.0
    control: float = 240.0
    soak_clients: int = 8
    leaving: float = 0.05
    leak: int = 2**19

    @property
    def estimate(self) -> float:
        """Seconds of all phases, without the start of the servers."""
        ways = len(get_args(Way))
        closed, opened = (len(sizes) for sizes in (self.clients, self.loads))
        durations = {
            "load": self.rounds * ways * (closed * (self.closed + self.settle) + opened * (self.open + self.settle)),
            "overload": self.capacity + self.overload + 2 * self.settle,
            "soak": self.soak + self.control + 4 * self.settle,
        }
        return sum(seconds for part, seconds in durations.items() if part in self.parts)
