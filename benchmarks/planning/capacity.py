"""Capacity planning: the arrivals of requests, and the number of devices that a load needs."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...errors import UserError
from .costs import DeviceCosts
from .simulate import RequestKind, SimulatedLoad, WorkerSetting, simulate

WARMUP = 0.1
"""Share of the first requests that percentiles omit, because these requests find empty devices."""

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Arrival rates of ``curve``, as shares of the capacity of one device."""


def arrivals(rate: float, count: int, seed: int = 0) -> list[float]:
    """Return the seconds at which the requests of a Poisson process arrive, in order.

    Args:
        rate: mean number of requests a second.
        count: number of requests.

    Raises:
        UserError: the rate is not above 0.
    """
    if not rate > 0:
        raise UserError(f"the arrival rate is {rate:g} requests a second: give a rate above 0")
    generator = random.Random(seed)
    return list(itertools.accumulate(generator.expovariate(rate) for _ in range(count)))


@dataclass(frozen=True)
class RequestLoad:
    """A load of requests.

    Attributes:
        kinds: kinds of requests; each request gets a random one.
        requests: number of simulated requests.
    """

    kinds: Sequence[RequestKind]
    requests: int = 2000
    seed: int = 0

    def on(self, costs: DeviceCosts, setting: WorkerSetting, rate: float) -> SimulatedLoad:
        """Simulate the load at this rate of requests a second."""
        times = arrivals(rate, self.requests, self.seed)
        return simulate(costs, self.kinds, times, setting, self.seed)


def capacity(costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting) -> float:
    """Return the requests a second that one device completes when its queue is never empty."""
    one = replace(setting, devices=1, max_queue=load.requests)
    return simulate(costs, load.kinds, [0.0] * load.requests, one, load.seed).throughput


def curve(costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting) -> list[tuple[float, SimulatedLoad]]:
    """Simulate one device at ``SHARES`` of its capacity; return each rate in requests a second with its result."""
    most = capacity(costs, load, setting)
    one = replace(setting, devices=1)
    return [(most * share, load.on(costs, one, most * share)) for share in SHARES]


def meets(simulated: SimulatedLoad, p99: float) -> bool:
    """Return whether no request is rejected and 99 % of the requests take at most ``p99`` seconds."""
    return simulated.rejected == 0 and simulated.percentile(99, WARMUP) <= p99


def devices_for(
    costs: DeviceCosts, load: RequestLoad, setting: WorkerSetting, rate: float, p99: float, most: int = 4096
) -> tuple[int, SimulatedLoad]:
    """Return the smallest number of devices that meets a p99, and the simulation with this number.

    Raises:
        UserError: ``most`` devices are not enough; the message says why.
    """
    results: dict[int, SimulatedLoad] = {}

    def enough(devices: int) -> bool:
        # With many devices, each needs enough requests for a percentile.
        scaled = replace(load, requests=max(load.requests, 50 * devices))
        results[devices] = scaled.on(costs, replace(setting, devices=devices), rate)
        return meets(results[devices], p99)

    alone = simulate(costs, load.kinds, [1e6 * index for index in range(100)], replace(setting, devices=1), load.seed)
    if alone.percentile(99) > p99:
        raise UserError(
            f"a request alone on a device already takes {alone.percentile(99):.2f} s, so a p99 of {p99:g} s is "
            "impossible: allow more time, take fewer steps or more caching, or use a faster device"
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
