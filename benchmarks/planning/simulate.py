"""A discrete-event simulator of workers, with the worker's policy, and measured times in place of engines.

A device does one task at a time, like ``runtime.batching.batcher``: the Python code of a request, or an engine call
once every request in flight waits for the UNet. An event is an arrival or the end of a task.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ...runtime.batching.policy import Policy, WaitingCall
from ..stats import percentile
from .costs import DeviceCosts

HORIZON = 60.0
"""Seconds after which a request without a deadline is due, as in ``runtime.batching.worker.HORIZON``."""

_Effect = Callable[[float], None]


@dataclass(frozen=True)
class RequestKind:
    """The UNet calls of a request.

    Attributes:
        full: for each call, whether it is full.
    """

    full: tuple[bool, ...]


@dataclass(frozen=True)
class WorkerSetting:
    """The settings of the simulated workers.

    Attributes:
        policy: batching policy.
        devices: number of devices with a worker each; a request goes to the worker with the fewest requests.
        max_in_flight, max_queue, max_batch: limits of each worker; see ``runtime.batching.Worker``.
        whole_requests: whether new requests wait until all in flight are done, as in servers that batch whole requests.
    """

    policy: Policy
    devices: int = 1
    max_in_flight: int = 8
    max_queue: int = 64
    max_batch: int = 16
    whole_requests: bool = False


@dataclass(frozen=True)
class SimulatedLoad:
    """The result of a simulation.

    Attributes:
        latencies: seconds from arrival to image, in the order of arrival, without rejected requests.
        queued: seconds from arrival until the work began, in the same order.
        rejected: number of requests that found the queue full.
        seconds: seconds from the first arrival to the last image.
        busy: seconds that the devices worked, summed over the devices.
        engine: seconds of ``busy`` in engine calls.
        calls, rows: number of engine calls, and sum of their rows.
        devices: number of devices.
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
        """Share of the time in which the devices work."""
        return self.busy / (self.seconds * self.devices) if self.seconds else 0.0

    @property
    def mean_rows(self) -> float:
        """Mean number of rows of an engine call."""
        return self.rows / self.calls if self.calls else 0.0

    def percentile(self, percent: float, skip: float = 0.0) -> float:
        """Return a percentile of the latencies without the first requests, of which ``skip`` is the share."""
        latencies = self.latencies[int(len(self.latencies) * skip) :]
        return percentile(latencies, percent) if latencies else float("inf")


@dataclass(eq=False)
class _Request:
    key: int
    kind: RequestKind
    arrival: float
    began: float = 0.0
    call: int = 0
    passed_over: int = 0
    ended: float | None = None


class _Device:
    """One worker: its queue, its requests in flight, and the tasks that wait for the device."""

    def __init__(self, costs: DeviceCosts, setting: WorkerSetting) -> None:
        self._costs, self._setting = costs, setting
        self._queue: list[tuple[float, int, _Request]] = []
        self._in_flight = 0
        self._tasks: deque[tuple[float, _Effect]] = deque()
        self._at_unet: dict[int, _Request] = {}
        self.busy = self.engine = 0.0
        self.calls = self.rows = 0
        self.working = False

    @property
    def load(self) -> int:
        """Number of requests that wait or are in flight."""
        return len(self._queue) + self._in_flight

    def submit(self, request: _Request, now: float) -> bool:
        """Queue a request; return False if the queue is full."""
        free = self._setting.max_in_flight - self._in_flight
        if len(self._queue) >= self._setting.max_queue + free:
            return False
        heapq.heappush(self._queue, (request.arrival + HORIZON, request.key, request))
        self._admit(now)
        return True

    def next_task(self) -> tuple[float, _Effect] | None:
        """Start the next task; return its seconds and the function to call at its end, or None without a task."""
        if self._tasks:
            task = self._tasks.popleft()
        elif self._at_unet:
            task = self._engine_call()
        else:
            return None
        self.busy += task[0]
        return task

    def _admit(self, now: float) -> None:
        if self._setting.whole_requests and self._in_flight:
            return
        while self._queue and self._in_flight < self._setting.max_in_flight:
            request = heapq.heappop(self._queue)[2]
            request.began = now
            self._in_flight += 1
            self._tasks.append((self._costs.encode, partial(self._reach_unet, [request])))

    def _reach_unet(self, requests: Sequence[_Request], now: float) -> None:
        for request in requests:
            request.passed_over = 0
            self._at_unet[request.key] = request

    def _engine_call(self) -> tuple[float, _Effect]:
        costs = self._costs
        waiting = tuple(
            WaitingCall(
                request.key,
                0,
                None if request.kind.full[request.call] else costs.cut,
                costs.rows,
                request.arrival + HORIZON,
                request.passed_over,
            )
            for request in self._at_unet.values()
        )
        pick = self._setting.policy.choose(waiting, {0: self._setting.max_batch})
        members = [self._at_unet.pop(key) for key in pick.members]
        for request in self._at_unet.values():
            request.passed_over += 1
        rows = len(members) * costs.rows
        seconds = costs.times.seconds(pick.cut, rows)
        self.calls += 1
        self.rows += rows
        self.engine += seconds
        return seconds, partial(self._engine_call_ended, members, rows)

    def _engine_call_ended(self, members: Sequence[_Request], rows: int, now: float) -> None:
        for request in members:
            request.call += 1
        done = [request for request in members if request.call == len(request.kind.full)]
        unfinished = [request for request in members if request not in done]
        self._tasks.append((self._costs.gaps.seconds(None, rows), partial(self._reach_unet, unfinished)))
        self._tasks += [(self._costs.decode, partial(self._finish, request)) for request in done]

    def _finish(self, request: _Request, now: float) -> None:
        request.ended = now
        self._in_flight -= 1
        self._admit(now)


def simulate(
    costs: DeviceCosts, kinds: Sequence[RequestKind], arrivals: Sequence[float], setting: WorkerSetting, seed: int = 0
) -> SimulatedLoad:
    """Simulate requests that arrive at these seconds; each request is of a random kind."""
    generator = random.Random(seed)
    devices = [_Device(costs, setting) for _ in range(setting.devices)]
    order = itertools.count()  # breaks ties between events of the same moment
    events: list[tuple[float, int, _Effect]] = []
    loads: list[tuple[int, int]] = [(0, index) for index in range(setting.devices)]
    accepted: list[_Request] = []
    rejected = 0

    def schedule(moment: float, effect: _Effect) -> None:
        heapq.heappush(events, (moment, next(order), effect))

    def start_task(index: int, now: float) -> None:
        device = devices[index]
        task = device.next_task()
        device.working = task is not None
        if task is not None:
            schedule(now + task[0], partial(end_task, index, task[1]))

    def end_task(index: int, effect: _Effect, now: float) -> None:
        before = devices[index].load
        effect(now)
        if devices[index].load != before:
            heapq.heappush(loads, (devices[index].load, index))
        start_task(index, now)

    def least_loaded() -> int:
        while True:  # each change of a load adds an entry; outdated entries are dropped here
            load, index = loads[0]
            if devices[index].load == load:
                return index
            heapq.heappop(loads)

    def arrive(request: _Request, now: float) -> None:
        nonlocal rejected
        index = least_loaded()
        if not devices[index].submit(request, now):
            rejected += 1
            return
        accepted.append(request)
        heapq.heappush(loads, (devices[index].load, index))
        if not devices[index].working:
            start_task(index, now)

    for key, moment in enumerate(arrivals):
        schedule(moment, partial(arrive, _Request(key, generator.choice(kinds), moment)))
    now = 0.0
    while events:
        now, _, effect = heapq.heappop(events)
        effect(now)
    return SimulatedLoad(
        latencies=tuple(request.ended - request.arrival for request in accepted if request.ended is not None),
        queued=tuple(request.began - request.arrival for request in accepted),
        rejected=rejected,
        seconds=now - (arrivals[0] if arrivals else 0.0),
        busy=sum(device.busy for device in devices),
        engine=sum(device.engine for device in devices),
        calls=sum(device.calls for device in devices),
        rows=sum(device.rows for device in devices),
        devices=setting.devices,
    )
