"""Result of ``offcut bench serve``: throughput and latency of three ways to batch, overload, and soak."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from ..stats import percentile

Way = Literal["steps", "single", "whole"]
"""``steps``: the worker as it is; ``single``: one request at a time; ``whole``: batches of whole requests."""


class Percentiles(BaseModel):
    """Percentiles of durations in seconds."""

    model_config = ConfigDict(extra="forbid")

    p50: float
    p90: float
    p99: float
    most: float
    count: int = Field(description="number of durations")

    @classmethod
    def of(cls, values: list[float]) -> Percentiles | None:
        """Return the percentiles of these durations; None where there are no durations."""
        if not values:
            return None
        p50, p90, p99 = (percentile(values, percent) for percent in (50, 90, 99))
        return cls(p50=p50, p90=p90, p99=p99, most=max(values), count=len(values))


class ClosedRow(BaseModel):
    """A closed loop, in which each client waits for its image before its next request."""

    model_config = ConfigDict(extra="forbid")

    way: Way
    clients: int
    throughput: list[float] = Field(description="images a second, by round")
    latency: Percentiles | None = Field(description="of all rounds")


class OpenRow(BaseModel):
    """An open loop, in which requests come at random moments."""

    model_config = ConfigDict(extra="forbid")

    way: Way
    load: float = Field(description="rate as a share of the capacity, the smaller throughput of steps and whole")
    rates: list[float] = Field(description="requests a second, by round")
    p50: list[float] = Field(description="seconds from the moment a request was due, by round")
    latency: Percentiles | None = Field(description="of all rounds")
    refused: int
    late: Percentiles | None = Field(description="seconds by which the client sent requests too late")


class BatchRow(BaseModel):
    """Seconds of the engine calls that several requests share, measured without HTTP."""

    model_config = ConfigDict(extra="forbid")

    requests: int
    rows: int
    full: float
    shallow: float
    between: float = Field(description="from one engine call to the next")


class Overload(BaseModel):
    """A load far above the capacity."""

    model_config = ConfigDict(extra="forbid")

    times: float = Field(description="offered rate as a multiple of the capacity")
    rate: float
    seconds: float
    capacity: float = Field(description="images a second with every place taken and no request refused")
    throughput: float
    at_capacity: Percentiles | None = Field(description="latency with every place taken and no request refused")
    accepted: Percentiles | None = Field(description="latency under overload")
    refusals: Percentiles | None = Field(description="seconds until a request was refused")
    late: Percentiles | None = Field(description="seconds by which the client sent requests too late")
    client: float | None = Field(default=None, description="number of this machine's cores that the client used")
    places: int = Field(description="number of requests that can run or wait in the server")
    taken: int = Field(description="largest number of places taken in any sample")
    statuses: dict[str, int]
    unexpected: int = Field(description="replies that are neither an image nor a 429 or 503 with Retry-After")

    @property
    def title(self) -> str:
        """Title of the table."""
        sent = "" if self.client is None else f"; sending them takes {self.client:.2f} cores"
        return f"{self.rate:.1f} requests a second, {self.times:g} times the capacity{sent}"


class Soak(BaseModel):
    """A long run with requests of several sizes and lengths; some clients disconnect."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    warm_up: float = Field(description="share of the first samples, which do not count")
    clients: int
    leak: int = Field(description="bytes that the server leaked on purpose at each request")
    requests: int
    left: int = Field(description="requests whose client disconnected")
    statuses: dict[str, int]
    unexpected: int = Field(
        description="replies to connected clients that are neither an image nor a 429 or 503 with Retry-After"
    )
    first_bytes: int = Field(description="resident memory after the warm-up")
    last_bytes: int
    most_bytes: int
    held: int = Field(description="requests and cache slots that the idle server still held at the end")

    @property
    def growth(self) -> int:
        """Growth of the resident memory in bytes."""
        return self.last_bytes - self.first_bytes


class ServingLoad(BaseModel):
    """The result of a run."""

    model_config = ConfigDict(extra="ignore")  # earlier versions compared the figures with goals

    model: str
    engine: str
    threads: int | None = Field(description="threads of the engine; None for one per core")
    request: dict[str, int | float | str] = Field(description="defaults of each request, except in the soak")
    in_flight: int
    queue: int
    rows: int = Field(description="maximum number of rows in an engine call")
    rounds: int
    seconds: dict[str, float] = Field(description="duration of each window, by its name")
    closed: list[ClosedRow] = []
    open: list[OpenRow] = []
    batches: list[BatchRow] = []
    allowed: float | None = Field(
        default=None,
        description="ratio of the throughput with in_flight requests to that with one, simulated with these times",
    )
    allowed_latency: float | None = Field(
        default=None,
        description="ratio of the p50 of batches of whole requests to that of shared steps at 0.7 of the capacity, "
        "simulated with only the times of engine calls",
    )
    overload: Overload | None = None
    soak: Soak | None = None
    control: Soak | None = None

    @property
    def faults(self) -> int:
        """Number of unexpected replies, and of requests and cache slots that the idle server still held."""
        soaks = [soak for soak in (self.soak, self.control) if soak is not None]
        unexpected = sum(soak.unexpected for soak in soaks) + (self.overload.unexpected if self.overload else 0)
        return unexpected + sum(soak.held for soak in soaks)
