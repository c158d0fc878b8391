"""A discrete-event simulator of workers: the same policy and the same turns, with times instead of engines.

A device does one thing at a time, as ``runtime.batching.batcher`` has it: the code of requests in the order in which
they ask, and an engine call when every request in flight stands at the UNet. So its events are the ends of these.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from ...runtime.batching.policy import Policy, WaitingCall
from .costs import Costs

HORIZON = 60.0
"""Seconds after which a request without a deadline counts as due: ``runtime.batching.worker.HORIZON``."""


@dataclass(frozen=True)
class Kind:
    """What a request asks for.

    Attributes:
        full: for each of its UNet calls, whether it is full.
    """

    full: tuple[bool, ...]


@dataclass(frozen=True)
class Setting:
    """The workers.

    Attributes:
        devices: as many workers, each with a device of its own; a request goes to the one with the fewest.
        max_in_flight, max_queue, max_batch: of each; see ``runtime.batching.Worker``.
        whole_requests: batch as other servers do: who comes waits until all in flight are done. For comparison.
    """

    policy: Policy
    devices: int = 1
    max_in_flight: int = 8
    max_queue: int = 64
    max_batch: int = 16
    whole_requests: bool = False


@dataclass(eq=False)
class _Job:
    key: int
    kind: Kind
    came: float
    began: float = 0.0
    call: int = 0
    passed: int = 0
    ended: float | None = None

    @property
    def over(self) -> bool:
        return self.call == len(self.kind.full)


@dataclass(frozen=True)
class Outcome:
    """What happened.

    Attributes:
        latencies: seconds from arrival to image, in the order of arrival, without the rejected.
        queued: seconds from arrival until work began, likewise.
        rejected: requests that found the queue full.
        seconds: from the first arrival to the last image.
        busy: seconds that devices worked, all together.
        engine: seconds of these that were engine calls.
        calls, rows: engine calls, and their rows altogether.
        devices: how many there were.
    """

    latencies: tuple[float, ...]
    queued: tuple[float, ...]
    rejected: int
    seconds: float
    busy: float
    engine: float
    calls: int
    rows: int
    devices: int

    @property
    def throughput(self) -> float:
        """Images a second."""
        return len(self.latencies) / self.seconds if self.seconds else 0.0

    @property
    def utilisation(self) -> float:
        """Share of the time that devices work."""
        return self.busy / (self.seconds * self.devices) if self.seconds else 0.0

    @property
    def mean_rows(self) -> float:
        return self.rows / self.calls if self.calls else 0.0

    def percentile(self, percent: float, skip: float = 0.0) -> float:
        """The latency that so many percent stay within; of the requests after a first share, 0..1, that is left out."""
        kept = sorted(self.latencies[int(len(self.latencies) * skip) :])
        if not kept:
            return float("inf")
        return kept[min(len(kept) - 1, int(len(kept) * percent / 100))]


class _Device:
    """One worker: a queue, requests in flight, and what it does at the moment."""

    def __init__(self, costs: Costs, setting: Setting) -> None:
        self._costs, self._setting = costs, setting
        self._queue: list[tuple[float, int, _Job]] = []
        self._in_flight = 0
        self._asking: deque[tuple[float, Callable[[float], None]]] = deque()
        self._at_unet: dict[int, _Job] = {}
        self.busy = self.engine = 0.0
        self.calls = self.rows = 0
        self.working = False

    @property
    def load(self) -> int:
        return len(self._queue) + self._in_flight

    def take(self, job: _Job, now: float) -> bool:
        """Queue a request; False if the queue is full."""
        free = self._setting.max_in_flight - self._in_flight
        if len(self._queue) >= self._setting.max_queue + free:
            return False
        heapq.heappush(self._queue, (job.came + HORIZON, job.key, job))
        self._admit(now)
        return True

    def next(self, now: float) -> tuple[float, Callable[[float], None]] | None:
        """The work that begins now: its seconds, and what its end brings about. None if there is none."""
        if self._asking:
            work = self._asking.popleft()
        elif self._at_unet:
            work = self._tick()
        else:
            return None
        self.busy += work[0]
        return work

    def _admit(self, now: float) -> None:
        if self._setting.whole_requests and self._in_flight:
            return
        while self._queue and self._in_flight < self._setting.max_in_flight:
            job = heapq.heappop(self._queue)[2]
            job.began = now
            self._in_flight += 1
            self._asking.append((self._costs.encode, lambda end, job=job: self._arrive([job])))  # type: ignore[misc]

    def _arrive(self, jobs: Sequence[_Job]) -> None:
        for job in jobs:
            job.passed = 0
            self._at_unet[job.key] = job

    def _tick(self) -> tuple[float, Callable[[float], None]]:
        costs = self._costs
        waiting = tuple(
            WaitingCall(
                job.key,
                0,
                None if job.kind.full[job.call] else costs.cut,
                costs.rows,
                job.came + HORIZON,
                job.passed,
            )
            for job in self._at_unet.values()
        )
        pick = self._setting.policy.choose(waiting, {0: self._setting.max_batch})
        jobs = [self._at_unet.pop(key) for key in pick.members]
        for job in self._at_unet.values():
            job.passed += 1
        rows = len(jobs) * costs.rows
        seconds = costs.times.seconds(pick.cut, rows)
        self.calls += 1
        self.rows += rows
        self.engine += seconds
        return seconds, lambda end: self._ticked(jobs, rows)

    def _ticked(self, jobs: Sequence[_Job], rows: int) -> None:
        for job in jobs:
            job.call += 1
        done = [job for job in jobs if job.over]
        on = [job for job in jobs if not job.over]
        self._asking.append((self._costs.gaps.seconds(None, rows), lambda end: self._arrive(on)))
        for job in done:
            self._asking.append((self._costs.decode, lambda end, job=job: self._end(job, end)))  # type: ignore[misc]

    def _end(self, job: _Job, now: float) -> None:
        job.ended = now
        self._in_flight -= 1
        self._admit(now)


@dataclass(order=True)
class _Event:
    time: float
    order: int
    act: Callable[[float], None] = field(compare=False)


def simulate(
    costs: Costs, kinds: Sequence[Kind], arrivals: Sequence[float], setting: Setting, seed: int = 0
) -> Outcome:
    """Let requests come at these seconds, each of a kind that is drawn at random."""
    draw = random.Random(seed)
    devices = [_Device(costs, setting) for _ in range(setting.devices)]
    events: list[_Event] = []
    order = itertools.count()
    loads: list[tuple[int, int]] = [(0, place) for place in range(setting.devices)]
    jobs: list[_Job] = []
    rejected = 0

    def work(device: _Device, place: int, now: float) -> None:
        task = device.next(now)
        device.working = task is not None
        if task is not None:
            seconds, effect = task

            def end(moment: float) -> None:
                before = device.load
                effect(moment)
                if device.load != before:
                    heapq.heappush(loads, (device.load, place))
                work(device, place, moment)

            heapq.heappush(events, _Event(now + seconds, next(order), end))

    def least_loaded() -> int:
        while True:  # entries are renewed whenever a load changes; older ones are passed over
            load, place = loads[0]
            if devices[place].load == load:
                return place
            heapq.heappop(loads)

    def arrive(job: _Job, now: float) -> None:
        nonlocal rejected
        place = least_loaded()
        if not devices[place].take(job, now):
            rejected += 1
            return
        jobs.append(job)
        heapq.heappush(loads, (devices[place].load, place))
        if not devices[place].working:
            work(devices[place], place, now)

    for key, moment in enumerate(arrivals):
        job = _Job(key, draw.choice(kinds), moment)
        heapq.heappush(events, _Event(moment, next(order), lambda now, job=job: arrive(job, now)))  # type: ignore[misc]
    last = 0.0
    while events:
        event = heapq.heappop(events)
        last = event.time
        event.act(event.time)
    return Outcome(
        latencies=tuple(job.ended - job.came for job in jobs if job.ended is not None),
        queued=tuple(job.began - job.came for job in jobs),
        rejected=rejected,
        seconds=last - (arrivals[0] if arrivals else 0.0),
        busy=sum(device.busy for device in devices),
        engine=sum(device.engine for device in devices),
        calls=sum(device.calls for device in devices),
        rows=sum(device.rows for device in devices),
        devices=setting.devices,
    )
