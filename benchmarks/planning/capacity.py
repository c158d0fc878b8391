"""Capacity planning: the arrivals of a load, and the number of devices that it needs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ...errors import UserError
from .costs import DeviceCosts
from .simulate import RequestKind, SimulatedLoad, WorkerSetting, simulate

WARMUP = 0.1
"""Share of the requests at the beginning that percentiles leave out: they find empty devices."""

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Rates of the curve, as shares of a device's capacity."""

PROCESSES = ("poisson", "uniform", "burst")
_BURST = 8


def arrivals(process: str, rate: float, count: int, seed: int = 0) -> list[float]:
    """Return the seconds at which requests arrive, from 0 on, in order.

    Args:
        process: ``poisson``: independent of one another; ``uniform``: at equal distances; ``burst``: eight at once,
            the bursts a Poisson process.
        rate: mean number of requests a second.

    Raises:
        UserError: the process is unknown, or the rate is not above 0.
    """
    if process not in PROCESSES:
        raise UserError(f"there is no arrival process {process!r}: choose {', '.join(PROCESSES)}, or give a trace")
    if not rate > 0:
        raise UserError(f"requests come at a rate above 0 a second, not {rate:g}")
    if process == "uniform":
        return [index / rate for index in range(count)]
    draw = random.Random(seed)
    size = _BURST if process == "burst" else 1
    times: list[float] = []
    moment = 0.0
    while len(times) < count:
        moment += draw.expovariate(rate / size)
        times += [moment] * size
    return times[:count]


def read_trace(path: Path) -> list[float]:
    """Read arrivals from a file with one number of seconds a line, in any order; the first arrival becomes 0.

    Raises:
        UserError: the file cannot be read, or a line is not a number.
    """
    try:
        lines = path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the trace {path}: {error}; give a text file of seconds") from error
    try:
        times = sorted(float(line) for line in lines)
    except ValueError as error:
        raise UserError(f"the trace {path} holds something else than seconds, one a line: {error}") from error
    if not times or times[0] != times[0] or times[-1] - times[0] == float("inf"):
        raise UserError(f"the trace {path} holds no arrivals: give seconds, one a line")
    return [moment - times[0] for moment in times]


@dataclass(frozen=True)
class RequestLoad:
    """A load of requests.

    Attributes:
        kinds: each request is one of these, drawn at random.
        process: of ``PROCESSES``.
        requests: number of requests that are simulated for a figure.
    """

    kinds: Sequence[RequestKind]
    process: str = "poisson"
    requests: int = 2000
    seed: int = 0

    def on(self, costs: DeviceCosts, setting: WorkerSetting, rate: float) -> SimulatedLoad:
        """Simulate the load at a rate of requests a second."""
        times = arrivals(self.process, rate, self.requests, self.seed)
        return simulate(costs, self.kinds, times, setting, self.seed)


def capacity(costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting) -> float:
    """Return the requests a second that one device can do when its queue is never empty."""
    one = replace(setting, devices=1, max_queue=load.requests)
    return simulate(costs, load.kinds, [0.0] * load.requests, one, load.seed).throughput


def curve(costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting) -> list[tuple[float, SimulatedLoad]]:
    """Simulate one device at ``SHARES`` of its capacity; return the rates in requests a second with their results."""
    most = capacity(costs, load, setting)
    one = replace(setting, devices=1)
    return [(most * share, load.on(costs, one, most * share)) for share in SHARES]


def alternatives(
    costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting, rate: float
) -> dict[str, SimulatedLoad]:
    """Simulate a load as set, with fewer requests in flight, and in batches of whole requests."""
    most = setting.max_in_flight
    settings = {f"deadline, {most}": setting}
    for fewer in (1, 2, 4, 8, 16):
        if fewer < most:
            queue = setting.max_queue + most - fewer
            settings[f"deadline, {fewer}"] = replace(setting, max_in_flight=fewer, max_queue=queue)
    settings[f"whole requests, {most}"] = replace(setting, whole_requests=True)
    return {name: load.on(costs, each, rate) for name, each in settings.items()}


def meets(simulated: SimulatedLoad, p99: float) -> bool:
    """Return whether no request is rejected and 99 % of the requests take at most ``p99`` seconds."""
    return simulated.rejected == 0 and simulated.percentile(99, WARMUP) <= p99


def devices_for(
    costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting, rate: float, p99: float, most: int = 4096
) -> tuple[int, SimulatedLoad]:
    """Return the smallest number of devices that meets a p99, and the simulation with it.

    Raises:
        UserError: ``most`` devices are not enough; the message says why.
    """
    results: dict[int, SimulatedLoad] = {}

    def enough(devices: int) -> bool:
        # Each of many devices needs some requests to tell anything.
        scaled = replace(load, requests=max(load.requests, 50 * devices))
        results[devices] = scaled.on(costs, replace(setting, devices=devices), rate)
        return meets(results[devices], p99)

    alone = simulate(costs, load.kinds, [1e6 * index for index in range(100)], replace(setting, devices=1), load.seed)
    if alone.percentile(99) > p99:
        raise UserError(
            f"a request alone on a device already takes {alone.percentile(99):.2f} s, so a p99 of {p99:g} s is out of "
            "reach: allow more, take fewer steps or more caching, or use a faster device"
        )
    high = 1
    while not enough(high):
        if high >= most:
            raise UserError(f"{most} devices are not enough for {rate:g} requests a second within {p99:g} s")
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high, results[high]
