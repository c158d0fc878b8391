"""The measurements one after the other: servers are started, asked, and stopped."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, get_args

from ...errors import UserError
from ..planning.arrivals import arrivals
from ..schema.serving import ClosedRow, OpenRow, Overload, Percentiles, ServingLoad, Soak
from ..shapes.model import PROMPTS
from . import watch
from .batches import Batches
from .client import LEFT, Body, Client, Leaving, Reply, Window, closed, opened
from .goals import goals
from .process import Process, Serving, Way

Stage = Callable[[str], None]

PARTS = ("load", "overload", "soak")
_WARM_UP = 0.2
"""Share of a soak after which its memory counts."""

_LOOKS = 1.0
"""Seconds between looks at a soak's memory."""

_QUIET = 10.0
"""Seconds within which a server that nobody asks must have let go of everything."""


@dataclass(frozen=True)
class Plan:
    """How long, and how much of it. All in seconds where nothing else is said.

    Attributes:
        parts: of ``PARTS``.
        clients: of the closed loops; the goals are about the last.
        loads: of the open loops, as shares of the capacity.
        rounds: in which the ways take turns.
        closed, open: each window of a closed and of an open loop.
        settle: before each window.
        times: the rate under overload, of the capacity.
        overload, capacity: that window, and the one before with every place taken.
        soak, control: the long run, and the same on a server that leaks.
        soak_clients: of both.
        leaving: share of their requests whose client goes away.
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
        """Seconds of all parts, without what starting servers takes."""
        ways = len(get_args(Way))
        each = {
            "load": self.rounds
            * ways
            * (len(self.clients) * (self.closed + self.settle) + len(self.loads) * (self.open + self.settle)),
            "overload": self.capacity + self.overload + 2 * self.settle,
            "soak": self.soak + self.control + 4 * self.settle,
        }
        return sum(seconds for part, seconds in each.items() if part in self.parts)


def run(serving: Serving, plan: Plan, stage: Stage = lambda text: None) -> ServingLoad:
    """All parts of a plan.

    Raises:
        UserError: a server does not start, or has fewer places than there are clients.
    """
    places = serving.in_flight + serving.queue
    if "load" in plan.parts and max(plan.clients) > places:
        raise UserError(
            f"{max(plan.clients)} clients find only {places} places in the servers, so some would be refused: give "
            "fewer, or a longer queue"
        )
    measured = ServingLoad(
        model=serving.bundle.name,
        engine="",
        threads=serving.threads,
        request={
            "steps": serving.steps,
            "interval": serving.interval,
            "warmup": serving.warmup,
            "guidance": serving.guidance,
            **({} if serving.size is None else {"size": serving.size}),
        },
        in_flight=serving.in_flight,
        queue=serving.queue,
        rows=serving.rows,
        rounds=plan.rounds,
        seconds={name: getattr(plan, name) for name in ("closed", "open", "settle")},
    )
    if "load" in plan.parts:
        stage("measure engine calls by how many requests share them")
        batches = Batches.measure(serving, lambda text: stage(f"  {text}"))
        measured.batches, measured.allowed = batches.rows, batches.allowed(serving)
        measured.allowed_latency = batches.allowed_latency(serving)
        _load(serving, plan, measured, stage)
    if "overload" in plan.parts:
        measured.overload = _overload(serving, plan, measured, stage)
    if "soak" in plan.parts:
        measured.soak = _soak(serving, plan, plan.soak, 0, measured, stage)
        if plan.control:
            measured.control = _soak(serving, plan, plan.control, plan.leak, measured, stage)
    measured.goals = goals(measured)
    return measured


def _load(serving: Serving, plan: Plan, measured: ServingLoad, stage: Stage) -> None:
    """Closed and open loops; within a round the ways take turns, so that what slows the machine slows all of them."""
    ways: tuple[Way, ...] = get_args(Way)
    with ExitStack() as stack:
        stage("start a server for each way to batch")
        servers = {way: stack.enter_context(Process(serving, way)) for way in ways}
        measured.engine = servers["steps"].engine
        loops: dict[tuple[Way, int], list[Window]] = {(way, count): [] for way in ways for count in plan.clients}
        stage(f"closed loops of {' and '.join(map(str, plan.clients))} clients")
        for place in range(plan.rounds):
            for (way, count), windows in loops.items():
                stage(f"  round {place + 1} of {plan.rounds}: {way}, {count} clients")
                windows.append(_closed(servers[way].url, _simple(serving), count, plan.closed, plan.settle))
        measured.closed = [_closed_row(way, count, windows) for (way, count), windows in loops.items()]

        most = max(plan.clients)
        most_of = {way: statistics.median(each.throughput for each in loops[way, most]) for way in ways}
        capacity = min(most_of["steps"], most_of["whole"])
        stage(f"open loops at {' and '.join(f'{load:.0%}' for load in plan.loads)} of {capacity:.2f} images a second")
        streams: dict[tuple[Way, float], list[Window]] = {(way, load): [] for load in plan.loads for way in ways}
        for place in range(plan.rounds):
            for (way, load), windows in streams.items():
                stage(f"  round {place + 1} of {plan.rounds}: {way}, {load:.0%}")
                windows.append(
                    _open(servers[way].url, _simple(serving), load * capacity, plan.open, plan.settle, seed=place)
                )
        measured.open = [_open_row(way, load, load * capacity, windows) for (way, load), windows in streams.items()]


def _closed_row(way: Way, count: int, windows: Sequence[Window]) -> ClosedRow:
    return ClosedRow(
        way=way,
        clients=count,
        throughput=[each.throughput for each in windows],
        latency=Percentiles.of([seconds for each in windows for seconds in each.latencies]),
    )


def _open_row(way: Way, load: float, rate: float, windows: Sequence[Window]) -> OpenRow:
    replies = [reply for each in windows for reply in each.replies]
    return OpenRow(
        way=way,
        load=load,
        rates=[rate] * len(windows),
        p50=[statistics.median(each.latencies) if each.latencies else float("inf") for each in windows],
        latency=Percentiles.of([seconds for each in windows for seconds in each.latencies]),
        refused=sum(not reply.drawn for reply in replies),
        late=Percentiles.of([reply.sent - reply.due for reply in replies]),
    )


def _overload(serving: Serving, plan: Plan, measured: ServingLoad, stage: Stage) -> Overload:
    places = serving.in_flight + serving.queue
    with Process(serving, "steps") as server:
        measured.engine = server.engine
        stage(f"every place taken: {places} clients for {plan.capacity:g} s")
        full = _closed(server.url, _simple(serving), places, plan.capacity, plan.settle)
        rate = plan.times * full.throughput
        stage(f"overload: {rate:.1f} requests a second for {plan.overload:g} s")
        began, worked = time.perf_counter(), time.process_time()
        with watch.Watch(server.url, server.pid, 0.25) as seen:
            window = _open(server.url, _simple(serving), rate, plan.overload, plan.settle, seed=1)
        client = (time.process_time() - worked) / (time.perf_counter() - began)
    refused = [reply for reply in window.replies if _refused(reply)]
    return Overload(
        times=plan.times,
        rate=rate,
        seconds=plan.overload,
        capacity=full.throughput,
        throughput=window.throughput,
        at_capacity=Percentiles.of(full.latencies),
        accepted=Percentiles.of(window.latencies),
        refusals=Percentiles.of([reply.ended - reply.sent for reply in refused]),
        late=Percentiles.of([reply.sent - reply.due for reply in window.replies]),
        client=client,
        places=places,
        taken=seen.most(watch.QUEUED, watch.IN_FLIGHT),
        statuses=_statuses(window.replies),
        unexpected=sum(not (reply.drawn or _refused(reply)) for reply in window.replies),
    )


def _refused(reply: Reply) -> bool:
    """As a server should that has no room."""
    return reply.status in (429, 503) and reply.retry_after


def _statuses(replies: Sequence[Reply]) -> dict[str, int]:
    words = Counter(f"{reply.status} {reply.code or ''}".strip() for reply in replies)
    return dict(sorted(words.items()))


def _soak(serving: Serving, plan: Plan, seconds: float, leak: int, measured: ServingLoad, stage: Stage) -> Soak:
    clients = min(plan.soak_clients, serving.in_flight + serving.queue)
    with Process(serving, "steps", leak) as server:
        measured.engine = server.engine
        body = _mixed(serving, server.url)
        stage(f"soak{f' with a leak of {leak} bytes a request' if leak else ''}: {seconds / 60:g} minutes")
        settle = _closed(server.url, body, clients, plan.settle, plan.settle)
        usual = statistics.median(settle.latencies or [plan.settle])
        began = time.perf_counter()

        def told(look: watch.Look) -> None:
            stage(f"  {(look.at - began) / 60:.1f} of {seconds / 60:g} minutes, {look.resident / 1e6:.0f} MB")

        with watch.Watch(server.url, server.pid, min(_LOOKS, seconds / 40), told) as seen:
            window = _closed(server.url, body, clients, seconds, 0.0, _leaving(plan.leaving, usual))
        held = _held(server)
    found = watch.growth([look for look in seen.looks if look.at < window.ended], _WARM_UP)
    return Soak(
        seconds=seconds,
        warm_up=_WARM_UP,
        clients=clients,
        leak=leak,
        requests=len(window.replies),
        left=sum(reply.status == LEFT for reply in window.replies),
        statuses=_statuses(window.replies),
        unexpected=sum(not (reply.drawn or reply.status == LEFT or _refused(reply)) for reply in window.replies),
        first_bytes=found.first,
        last_bytes=found.last,
        most_bytes=found.most,
        held=held,
    )


def _held(server: Process) -> int:
    """Requests and slots that are left, once those that are given up have had time for their step."""
    deadline = time.perf_counter() + _QUIET
    while True:
        left = int(sum(watch.gauges(watch.read(f"{server.url}/metrics")).values()))
        if not left or time.perf_counter() > deadline:
            return left
        time.sleep(0.1)


def _simple(serving: Serving) -> Body:
    size = {} if serving.size is None else {"size": f"{serving.size}x{serving.size}"}
    return lambda number: {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **size}


def _mixed(serving: Serving, url: str) -> Body:
    """Three sizes around the requests' own, three numbers of steps, cached and not."""
    told = json.loads(watch.read(f"{url}/v1/models"))["data"][0]["offcut"]
    width, height = (serving.size,) * 2 if serving.size else map(int, told["size"].split("x"))
    step = told["multiple"]
    sizes = [f"{width}x{height}", f"{width + step}x{height}", f"{width}x{max(step, height - step)}"]
    lengths = [serving.steps, max(serving.steps * 3 // 4, 2), max(serving.steps // 2, 2)]

    def body(number: int) -> Mapping[str, Any]:
        draw = random.Random(number)
        return {
            **_simple(serving)(number),
            "size": draw.choice(sizes),
            "num_inference_steps": draw.choice(lengths),
            "interval": draw.choice([serving.interval, serving.interval, 1]),
        }

    return body


def _leaving(share: float, usual: float) -> Leaving:
    """Some clients go away, at any moment of what an image usually takes."""

    def leave(number: int) -> float | None:
        draw = random.Random(-1 - number)
        return draw.uniform(0.01, max(usual, 0.02)) if draw.random() < share else None

    return leave


def _closed(url: str, body: Body, count: int, seconds: float, settle: float, leaving: Leaving | None = None) -> Window:
    async def measure() -> Window:
        async with Client(url, body) as client:
            return await closed(client, count, seconds, settle, leaving)

    return asyncio.run(measure())


def _open(url: str, body: Body, rate: float, seconds: float, settle: float, seed: int) -> Window:
    async def measure() -> Window:
        count = int(rate * (seconds + settle) * 2) + 20  # more than come in that time
        moments = [moment for moment in arrivals("poisson", rate, count, seed) if moment < settle + seconds]
        async with Client(url, body) as client:
            return await opened(client, moments, seconds, settle)

    return asyncio.run(measure())
