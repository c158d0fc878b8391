"""How many devices a load needs, and what one device can bear."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ...errors import UserError
from .arrivals import arrivals
from .costs import Costs
from .simulate import Kind, Outcome, Setting, simulate

WARMUP = 0.1
"""Share of the requests, at first, that percentiles leave out: they found empty devices."""

SHARES = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)
"""Rates of the curve, as shares of what a device can do at most."""


@dataclass(frozen=True)
class Load:
    """Requests as they come.

    Attributes:
        kinds: each request is one of these, drawn at random.
        process: of ``arrivals.PROCESSES``.
        requests: how many are simulated for a figure.
    """

    kinds: Sequence[Kind]
    process: str = "poisson"
    requests: int = 2000
    seed: int = 0

    def on(self, costs: Costs, setting: Setting, rate: float) -> Outcome:
        """What happens at this rate of requests a second."""
        times = arrivals(self.process, rate, self.requests, self.seed)
        return simulate(costs, self.kinds, times, setting, self.seed)


@dataclass(frozen=True)
class Point:
    """One rate a device, and what came of it.

    Attributes:
        rate: requests a second for each device.
    """

    rate: float
    outcome: Outcome


def capacity(costs: Costs, load: Load, setting: Setting) -> float:
    """Requests a second that one device can do at most: with as many in flight as may be, all the time."""
    one = replace(setting, devices=1, max_queue=load.requests)
    return simulate(costs, load.kinds, [0.0] * load.requests, one, load.seed).throughput


def curve(costs: Costs, load: Load, setting: Setting) -> list[Point]:
    """One device at ``SHARES`` of what it can do."""
    most = capacity(costs, load, setting)
    one = replace(setting, devices=1)
    return [Point(most * share, load.on(costs, one, most * share)) for share in SHARES]


def ways(costs: Costs, load: Load, setting: Setting, rate: float) -> dict[str, Outcome]:
    """Return the outcomes of a load: as set, with fewer requests in flight, and in batches of whole requests."""
    most = setting.max_in_flight
    settings = {f"deadline, {most}": setting}
    for fewer in (1, 2, 4, 8, 16):
        if fewer < most:
            queue = setting.max_queue + most - fewer
            settings[f"deadline, {fewer}"] = replace(setting, max_in_flight=fewer, max_queue=queue)
    settings[f"whole requests, {most}"] = replace(setting, whole_requests=True)
    return {name: load.on(costs, each, rate) for name, each in settings.items()}


def devices_for(
    costs: Costs,
    load: Load,
    setting: Setting,
    rate: float,
    p99: float,
    most: int = 4096,
    tried: Callable[[int, Outcome], None] = lambda devices, outcome: None,
) -> tuple[int, Outcome]:
    """The smallest number of devices at which 99 % of the requests take at most so many seconds, and none is rejected.

    Raises:
        UserError: not even ``most`` devices do; the message says why.
    """
    outcomes: dict[int, Outcome] = {}

    def met(devices: int) -> bool:
        # With many devices each needs some requests, or nothing would be learnt about it.
        enough = replace(load, requests=max(load.requests, 50 * devices))
        outcomes[devices] = outcome = enough.on(costs, replace(setting, devices=devices), rate)
        tried(devices, outcome)
        return outcome.rejected == 0 and outcome.percentile(99, WARMUP) <= p99

    alone = simulate(costs, load.kinds, [1e6 * place for place in range(100)], replace(setting, devices=1), load.seed)
    if alone.percentile(99) > p99:
        raise UserError(
            f"a request alone on a device already takes {alone.percentile(99):.2f} s, so a p99 of {p99:g} s is out of "
            "reach: allow more, take fewer steps or more caching, or use a faster device"
        )
    high = 1
    while not met(high):
        if high >= most:
            raise UserError(f"{most} devices are not enough for {rate:g} requests a second within {p99:g} s")
        high = min(2 * high, most)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high, outcomes[high]
