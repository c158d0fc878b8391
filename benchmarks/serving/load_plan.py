"""The settings of a load test: the servers and the phases."""

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
        bundle: the bundle that they serve.
        steps, interval, warmup, guidance: defaults of requests; the clients' requests name none.
        size: side of the images in pixels, which requests name; None for the model's own.
        in_flight: requests that run at the same time, or in one batch of whole requests.
        queue: requests that wait.
        rows: most rows of an engine call.
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
        """Number of requests that the server takes, running and waiting; the same for all ways to batch."""
        return self.in_flight + self.queue


@dataclass(frozen=True)
class LoadPlan:
    """The phases and their lengths, in seconds where nothing else is said.

    Attributes:
        parts: of ``PARTS``.
        clients: numbers of clients of the closed loops.
        loads: rates of the open loops, as shares of the capacity.
        rounds: in which the ways to batch take turns.
        closed, open: windows of a closed and of an open loop.
        settle: before each window.
        times: rate under overload, as a multiple of the capacity.
        overload, capacity: the window of overload, and the one before it with every place taken.
        soak, control: the long run, and the same on a server that leaks.
        soak_clients: of both.
        leaving: share of their requests whose client disconnects.
        leak: bytes that the control's server keeps at each request.
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
        """Seconds of all phases, without the start of servers."""
        ways = len(get_args(Way))
        closed, opened = (len(each) for each in (self.clients, self.loads))
        each = {
            "load": self.rounds * ways * (closed * (self.closed + self.settle) + opened * (self.open + self.settle)),
            "overload": self.capacity + self.overload + 2 * self.settle,
            "soak": self.soak + self.control + 4 * self.settle,
        }
        return sum(seconds for part, seconds in each.items() if part in self.parts)
