"""The phases of a load test: closed and open loops, overload, and soak."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, get_args

from ...errors import UserError
from ..planning.capacity import arrivals
from ..schema.serving import ClosedRow, OpenRow, Overload, Percentiles, ServingLoad, Soak, Way
from ..shapes.model import PROMPTS
from . import monitor
from .batches import measure_batches
from .client import LEFT, Body, Client, Leaving, Reply, Window, closed_loop, open_loop
from .load_plan import LoadPlan, ServerSetting
from .measured_server import MeasuredServer

Stage = Callable[[str], None]

_WARM_UP = 0.2
"""Share of a soak that counts as warm-up."""

_SAMPLE_SECONDS = 1.0
"""Seconds between samples of a soak's memory."""

_QUIET = 10.0
"""Seconds within which an idle server must have released everything."""


def run(setting: ServerSetting, plan: LoadPlan, stage: Stage = lambda text: None) -> ServingLoad:
    """Run all phases of a plan.

    Raises:
        UserError: a server does not start, or has fewer places than there are clients.
    """
    if "load" in plan.parts and max(plan.clients) > setting.places:
        raise UserError(
            f"{max(plan.clients)} clients find only {setting.places} places in the servers, so some would be refused: "
            "give fewer clients or a longer queue"
        )
    request = {name: getattr(setting, name) for name in ("steps", "interval", "warmup", "guidance", "size")}
    measured = ServingLoad(
        model=setting.bundle.name,
        engine="",
        threads=setting.threads,
        request={name: value for name, value in request.items() if value is not None},
        in_flight=setting.in_flight,
        queue=setting.queue,
        rows=setting.rows,
        rounds=plan.rounds,
        seconds={name: getattr(plan, name) for name in ("closed", "open", "settle")},
    )
    if "load" in plan.parts:
        stage("measure engine calls by the number of requests that share them")
        measure_batches(setting, measured, lambda text: stage(f"  {text}"))
        _load(setting, plan, measured, stage)
    if "overload" in plan.parts:
        measured.overload = _overload(setting, plan, measured, stage)
    if "soak" in plan.parts:
        measured.soak = _soak(setting, plan, plan.soak, 0, measured, stage)
        if plan.control:
            measured.control = _soak(setting, plan, plan.control, plan.leak, measured, stage)
    return measured


def _load(setting: ServerSetting, plan: LoadPlan, measured: ServingLoad, stage: Stage) -> None:
    """Run closed and open loops; the ways to batch take turns in each round, so that a slow moment affects all."""
    ways: tuple[Way, ...] = get_args(Way)
    body = _simple(setting)
    with ExitStack() as stack:
        stage("start a server for each way to batch")
        servers = {way: stack.enter_context(MeasuredServer(setting, way)) for way in ways}
        measured.engine = servers["steps"].engine
        loops: dict[tuple[Way, int], list[Window]] = {(way, count): [] for way in ways for count in plan.clients}
        stage(f"closed loops of {' and '.join(map(str, plan.clients))} clients")
        for index in range(plan.rounds):
            for (way, count), windows in loops.items():
                stage(f"  round {index + 1} of {plan.rounds}: {way}, {count} clients")
                windows.append(_closed(servers[way].url, body, count, plan.closed, plan.settle))
        measured.closed = [_closed_row(way, count, windows) for (way, count), windows in loops.items()]

        clients = max(plan.clients)
        throughputs = {way: statistics.median(window.throughput for window in loops[way, clients]) for way in ways}
        capacity = min(throughputs["steps"], throughputs["whole"])
        stage(f"open loops at {' and '.join(f'{load:.0%}' for load in plan.loads)} of {capacity:.2f} images a second")
        streams: dict[tuple[Way, float], list[Window]] = {(way, load): [] for load in plan.loads for way in ways}
        for index in range(plan.rounds):
            for (way, load), windows in streams.items():
                stage(f"  round {index + 1} of {plan.rounds}: {way}, {load:.0%}")
                windows.append(_open(servers[way].url, body, load * capacity, plan.open, plan.settle, seed=index))
        measured.open = [_open_row(way, load, load * capacity, windows) for (way, load), windows in streams.items()]


def _closed_row(way: Way, count: int, windows: Sequence[Window]) -> ClosedRow:
    return ClosedRow(
        way=way,
        clients=count,
        throughput=[window.throughput for window in windows],
        latency=Percentiles.of([seconds for window in windows for seconds in window.latencies]),
    )


def _open_row(way: Way, load: float, rate: float, windows: Sequence[Window]) -> OpenRow:
    replies = [reply for window in windows for reply in window.replies]
    return OpenRow(
        way=way,
        load=load,
        rates=[rate] * len(windows),
        p50=[statistics.median(window.latencies) if window.latencies else float("inf") for window in windows],
        latency=Percentiles.of([seconds for window in windows for seconds in window.latencies]),
        refused=sum(not reply.has_image for reply in replies),
        late=Percentiles.of([reply.sent - reply.due for reply in replies]),
    )


def _overload(setting: ServerSetting, plan: LoadPlan, measured: ServingLoad, stage: Stage) -> Overload:
    with MeasuredServer(setting, "steps") as server:
        measured.engine = server.engine
        stage(f"every place taken: {setting.places} clients for {plan.capacity:g} s")
        full = _closed(server.url, _simple(setting), setting.places, plan.capacity, plan.settle)
        rate = plan.times * full.throughput
        stage(f"overload: {rate:.1f} requests a second for {plan.overload:g} s")
        began, cpu_began = time.perf_counter(), time.process_time()
        with monitor.ServerMonitor(server.url, server.pid, 0.25) as observed:
            window = _open(server.url, _simple(setting), rate, plan.overload, plan.settle, seed=1)
        client = (time.process_time() - cpu_began) / (time.perf_counter() - began)
    return Overload(
        times=plan.times,
        rate=rate,
        seconds=plan.overload,
        capacity=full.throughput,
        throughput=window.throughput,
        at_capacity=Percentiles.of(full.latencies),
        accepted=Percentiles.of(window.latencies),
        refusals=Percentiles.of([reply.ended - reply.sent for reply in window.replies if reply.refused]),
        late=Percentiles.of([reply.sent - reply.due for reply in window.replies]),
        client=client,
        places=setting.places,
        taken=observed.most(monitor.QUEUED, monitor.IN_FLIGHT),
        statuses=_statuses(window.replies),
        unexpected=sum(not (reply.has_image or reply.refused) for reply in window.replies),
    )


def _statuses(replies: Sequence[Reply]) -> dict[str, int]:
    counted = Counter(f"{reply.status} {reply.code or ''}".strip() for reply in replies)
    return dict(sorted(counted.items()))


def _soak(
    setting: ServerSetting, plan: LoadPlan, seconds: float, leak: int, measured: ServingLoad, stage: Stage
) -> Soak:
    clients = min(plan.soak_clients, setting.places)
    with MeasuredServer(setting, "steps", leak) as server:
        measured.engine = server.engine
        body = _mixed(setting, server.url)
        stage(f"soak{f' with a leak of {leak} bytes a request' if leak else ''}: {seconds / 60:g} minutes")
        settle = _closed(server.url, body, clients, plan.settle, plan.settle)
        usual = statistics.median(settle.latencies or [plan.settle])
        began = time.perf_counter()

        def on_sample(sample: monitor.MemorySample) -> None:
            stage(f"  {(sample.at - began) / 60:.1f} of {seconds / 60:g} minutes, {sample.resident / 1e6:.0f} MB")

        interval = min(_SAMPLE_SECONDS, seconds / 40)
        with monitor.ServerMonitor(server.url, server.pid, interval, on_sample) as observed:
            window = _closed(server.url, body, clients, seconds, 0.0, _leaving(plan.leaving, usual))
        still_held = _held(server)
    samples = [sample for sample in observed.samples if sample.at < window.ended]
    first, last = monitor.growth(samples, _WARM_UP)
    return Soak(
        seconds=seconds,
        warm_up=_WARM_UP,
        clients=clients,
        leak=leak,
        requests=len(window.replies),
        left=sum(reply.status == LEFT for reply in window.replies),
        statuses=_statuses(window.replies),
        unexpected=sum(not (reply.has_image or reply.status == LEFT or reply.refused) for reply in window.replies),
        first_bytes=first,
        last_bytes=last,
        most_bytes=max(sample.resident for sample in samples),
        held=still_held,
    )


def _held(server: MeasuredServer) -> int:
    """Return the number of requests and cache slots that the idle server still holds once abandoned steps are over."""
    deadline = time.perf_counter() + _QUIET
    while True:
        still_held = int(sum(monitor.gauges(monitor.read(f"{server.url}/metrics")).values()))
        if not still_held or time.perf_counter() > deadline:
            return still_held
        time.sleep(0.1)


def _simple(setting: ServerSetting) -> Body:
    size = {} if setting.size is None else {"size": f"{setting.size}x{setting.size}"}
    return lambda number: {"prompt": PROMPTS[number % len(PROMPTS)], "seed": number, **size}


def _mixed(setting: ServerSetting, url: str) -> Body:
    """Return bodies of cached and uncached requests with three image sizes and three numbers of steps."""
    model = json.loads(monitor.read(f"{url}/v1/models"))["data"][0]["offcut"]
    width, height = (setting.size,) * 2 if setting.size else map(int, model["size"].split("x"))
    multiple = model["multiple"]
    sizes = [f"{width}x{height}", f"{width + multiple}x{height}", f"{width}x{max(multiple, height - multiple)}"]
    lengths = [setting.steps, max(setting.steps * 3 // 4, 2), max(setting.steps // 2, 2)]

    def body(number: int) -> Mapping[str, Any]:
        generator = random.Random(number)
        return {
            **_simple(setting)(number),
            "size": generator.choice(sizes),
            "num_inference_steps": generator.choice(lengths),
            "interval": generator.choice([setting.interval, setting.interval, 1]),
        }

    return body


def _leaving(share: float, usual: float) -> Leaving:
    """Make a share of the clients disconnect at a random moment of the usual latency."""

    def leave(number: int) -> float | None:
        generator = random.Random(-1 - number)
        return generator.uniform(0.01, max(usual, 0.02)) if generator.random() < share else None

    return leave


def _closed(url: str, body: Body, count: int, seconds: float, settle: float, leaving: Leaving | None = None) -> Window:
    return _with_client(url, body, lambda client: closed_loop(client, count, seconds, settle, leaving))


def _open(url: str, body: Body, rate: float, seconds: float, settle: float, seed: int) -> Window:
    count = int(rate * (seconds + settle) * 2) + 20  # more requests than arrive in that time
    moments = [moment for moment in arrivals(rate, count, seed) if moment < settle + seconds]
    return _with_client(url, body, lambda client: open_loop(client, moments, seconds, settle))


def _with_client(url: str, body: Body, measure: Callable[[Client], Awaitable[Window]]) -> Window:
    async def measured() -> Window:
        async with Client(url, body) as client:
            return await measure(client)

    return asyncio.run(measured())
