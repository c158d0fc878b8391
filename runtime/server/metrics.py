"""Metrics for Prometheus, in base units: the worker's counts at each scrape, and what the server itself times."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..batching import Statistics, Worker
from .problems import CODES

REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

OUTCOMES = ("done", "failed", "cancelled", "expired", "fault")
KINDS = ("full", "shallow")


class Metrics:
    """Of one server, in a registry of its own.

    Attributes:
        queue_seconds: from a request's arrival until work on it began.
        step_seconds: of a UNet call as its request sees it, by kind: with the wait for others at the same call.
        request_seconds: from arrival to end, by outcome.
        rejections: requests that were answered with an error, by its code.
    """

    def __init__(self, worker: Worker) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_OfWorker(worker))
        ProcessCollector(registry=self._registry)
        self.queue_seconds = Histogram(
            "offcut_queue_seconds",
            "From a request's arrival until work on it began.",
            buckets=(0.001, 0.01, *REQUEST_SECONDS),
            registry=self._registry,
        )
        self.step_seconds = Histogram(
            "offcut_step_seconds",
            "A UNet call as its request sees it.",
            ["kind"],
            buckets=STEP_SECONDS,
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "offcut_request_seconds",
            "From a request's arrival to its end.",
            ["outcome"],
            buckets=REQUEST_SECONDS,
            registry=self._registry,
        )
        self.rejections = Counter(
            "offcut_rejections_total",
            "Requests that were answered with an error.",
            ["reason"],
            registry=self._registry,
        )
        for kind in KINDS:
            self.step_seconds.labels(kind)
        for outcome in OUTCOMES:
            self.request_seconds.labels(outcome)
        for code in CODES:
            self.rejections.labels(code)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _OfWorker(Collector):
    """A worker's statistics as metrics, read when they are asked for."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker

    def collect(self) -> Iterator[Metric]:
        counted = self._worker.statistics()
        yield _gauge("offcut_healthy", "Whether the engines work.", float(counted.healthy))
        yield _gauge("offcut_queued_requests", "Requests that wait.", counted.queued)
        yield _gauge("offcut_in_flight_requests", "Requests that are worked on.", counted.in_flight)
        yield _gauge("offcut_cache_slots", "Requests that keep cached features.", counted.slots)
        yield _gauge("offcut_cache_bytes", "Device memory of all cached features.", counted.cache_bytes)
        yield _gauge("offcut_cache_limit_bytes", "Device memory that cached features may take.", counted.cache_limit)
        ended = CounterMetricFamily("offcut_requests", "Requests that ended.", labels=["outcome"])
        for outcome in OUTCOMES:
            total = counted.requests.get(outcome)
            ended.add_metric([outcome], total.count if total else 0)
        yield ended
        gathers = CounterMetricFamily("offcut_gathers", "Shallow calls by what their features cost.", labels=["copied"])
        gathers.add_metric(["yes"], counted.gathers)
        gathers.add_metric(["no"], counted.gathers_skipped)
        yield gathers
        yield from _engine_calls(counted)


def _engine_calls(counted: Statistics) -> Iterator[Metric]:
    """How many rows engine calls had, and how long they took altogether, by kind."""
    rows = HistogramMetricFamily("offcut_batch_rows", "Rows of an engine call, without padding.", labels=["kind"])
    seconds = CounterMetricFamily("offcut_engine_seconds", "Time of the engine calls themselves.", labels=["kind"])
    for kind in KINDS:
        counts = {size: total.count for (name, size), total in counted.ticks.items() if name == kind}
        rows.add_metric([kind], list(_buckets(counts)), sum(size * count for size, count in counts.items()))
        seconds.add_metric([kind], sum(total.seconds for (name, _), total in counted.ticks.items() if name == kind))
    yield rows
    yield seconds
    overhead = "Time of engine calls beside the engines' own: choosing, copying in and out."
    yield CounterMetricFamily("offcut_overhead_seconds", overhead, counted.overhead.seconds)


def _buckets(counts: dict[int, int]) -> Iterable[tuple[str, int]]:
    bounds = [*ROWS, float("inf")]
    least = [0, *ROWS]
    each = [
        sum(count for size, count in counts.items() if low < size <= high)
        for low, high in zip(least, bounds, strict=True)
    ]
    names = [*(f"{bound:.1f}" for bound in ROWS), "+Inf"]
    return zip(names, accumulate(each), strict=True)


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)
