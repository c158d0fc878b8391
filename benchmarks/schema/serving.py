"""What ``offcut bench serve`` measured: throughput and latency of three ways to batch, overload, soak, goals."""

from __future__ import annotations

import statistics
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

WayName = Literal["steps", "single", "whole"]


class Percentiles(BaseModel):
    """Seconds."""

    model_config = ConfigDict(extra="forbid")

    p50: float
    p90: float
    p99: float
    most: float
    count: int = Field(description="of how many")

    @classmethod
    def of(cls, values: list[float]) -> Percentiles | None:
        """None of nothing."""
        if not values:
            return None
        ordered = sorted(values)

        def at(percent: float) -> float:
            return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]

        return cls(p50=statistics.median(ordered), p90=at(90), p99=at(99), most=ordered[-1], count=len(ordered))


class ClosedRow(BaseModel):
    """So many clients, each of which waits for its image before it asks for another."""

    model_config = ConfigDict(extra="forbid")

    way: WayName
    clients: int
    throughput: list[float] = Field(description="images a second, by round")
    latency: Percentiles | None = Field(description="of all rounds")


class OpenRow(BaseModel):
    """Requests that come at random moments, at a share of what the server can do."""

    model_config = ConfigDict(extra="forbid")

    way: WayName
    load: float = Field(description="of the smaller of the throughputs of steps and whole")
    rates: list[float] = Field(description="requests a second, by round")
    p50: list[float] = Field(description="seconds from the moment a request was due, by round")
    latency: Percentiles | None = Field(description="of all rounds")
    refused: int
    late: Percentiles | None = Field(description="how much after its moment the generator sent a request")


class BatchRow(BaseModel):
    """Seconds of engine calls by how many requests share them, measured in the worker alone."""

    model_config = ConfigDict(extra="forbid")

    requests: int
    rows: int
    full: float
    shallow: float
    between: float = Field(description="from one engine call to the next")


class Overload(BaseModel):
    """Many more requests than can be served."""

    model_config = ConfigDict(extra="forbid")

    times: float = Field(description="the offered rate, of what the server can do")
    rate: float
    seconds: float
    capacity: float = Field(description="images a second with every place taken and nobody refused")
    throughput: float
    at_capacity: Percentiles | None = Field(description="latency with every place taken and nobody refused")
    accepted: Percentiles | None = Field(description="latency under overload")
    refusals: Percentiles | None = Field(description="seconds until a request was refused")
    late: Percentiles | None = Field(description="how much after its moment the generator sent a request")
    client: float | None = Field(default=None, description="cores that sending the requests took of this machine")
    places: int = Field(description="for requests, in flight and waiting together")
    taken: int = Field(description="most of them that were seen taken")
    statuses: dict[str, int]
    unexpected: int = Field(
        description="replies that are neither an image nor a 429 or 503 that says when to come back"
    )

    @property
    def title(self) -> str:
        """Of its table."""
        sent = "" if self.client is None else f"; sending them takes {self.client:.2f} cores"
        return f"{self.rate:.1f} requests a second, {self.times:g} times the capacity{sent}"


class Soak(BaseModel):
    """A long time with requests of several sizes and lengths, some of whose clients go away."""

    model_config = ConfigDict(extra="forbid")

    seconds: float
    warm_up: float = Field(description="share at first that does not count")
    clients: int
    leak: int = Field(description="bytes that the server kept at each request on purpose")
    requests: int
    left: int = Field(description="whose client went away")
    statuses: dict[str, int]
    unexpected: int = Field(description="neither an image nor a 429 or 503 that says when to come back, nor left")
    first_bytes: int = Field(description="resident memory after the warm-up")
    last_bytes: int
    most_bytes: int
    held: int = Field(description="requests and slots that the server still had when nobody asked any more")

    @property
    def growth(self) -> int:
        """Bytes."""
        return self.last_bytes - self.first_bytes


class Goal(BaseModel):
    """What was to be reached, and whether it was."""

    model_config = ConfigDict(extra="forbid")

    name: str
    wanted: str
    found: str
    met: bool


class ServingLoad(BaseModel):
    """One run."""

    model_config = ConfigDict(extra="forbid")

    model: str
    engine: str
    threads: int | None = Field(description="of the engine; None for one a core")
    request: dict[str, int | float | str] = Field(description="what each asks for, but in the soak")
    in_flight: int
    queue: int
    rows: int = Field(description="most of an engine call")
    rounds: int
    seconds: dict[str, float] = Field(description="of each measurement, by its name")
    closed: list[ClosedRow] = []
    open: list[OpenRow] = []
    batches: list[BatchRow] = []
    allowed: float | None = Field(
        default=None,
        description="throughput with in_flight requests over that with one, simulated with these times",
    )
    allowed_latency: float | None = Field(
        default=None,
        description="p50 of batches of whole requests over that of shared steps at 0.7 of the capacity, simulated with "
        "the times of engine calls alone",
    )
    overload: Overload | None = None
    soak: Soak | None = None
    control: Soak | None = None
    goals: list[Goal] = []
