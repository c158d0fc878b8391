"""Metrics for Prometheus, in base units: the worker's counts at each scrape, and what the server itself times."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..batching import Statistics
from .problems import CODES

REQUEST_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
STEP_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)

OUTCOMES = ("done", "failed", "cancelled", "expired", "fault")
KINDS = ("full", "shallow")
SKIPPED = "skipped"

Workers = Mapping[tuple[str, ...], Statistics]


class Metrics:
    """Of one server, in a registry of its own.

    Args:
        workers: called at each scrape: the statistics of each worker by the values of its labels.
        labels: their names; none where there is one worker.

    Attributes:
        registry: where more may be added.
        queue_seconds: from a request's arrival until work on it began.
        step_seconds: of a UNet call as its request sees it, by kind: with the wait for others at the same call.
        request_seconds: from arrival to end, by outcome.
        rejections: requests that were answered with an error, by its code.
    """

    def __init__(self, workers: Callable[[], Workers], labels: Sequence[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_OfWorkers(workers, tuple(labels)))
        ProcessCollector(registry=self.registry)
        self.queue_seconds = Histogram(
            "offcut_queue_seconds",
            "From a request's arrival until work on it began.",
            buckets=(0.001, 0.01, *REQUEST_SECONDS),
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "offcut_step_seconds",
            "A UNet call as its request sees it.",
            ["kind"],
            buckets=STEP_SECONDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "offcut_request_seconds",
            "From a request's arrival to its end.",
            ["outcome"],
            buckets=REQUEST_SECONDS,
            registry=self.registry,
        )
        self.rejections = Counter(
            "offcut_rejections_total",
            "Requests that were answered with an error.",
            ["reason"],
            registry=self.registry,
        )
        for kind in (*KINDS, SKIPPED):
            self.step_seconds.labels(kind)
        for outcome in OUTCOMES:
            self.request_seconds.labels(outcome)
        for code in CODES:
            self.rejections.labels(code)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


class _OfWorkers(Collector):
    """Workers' statistics as metrics, read when they are asked for."""

    def __init__(self, workers: Callable[[], Workers], labels: tuple[str, ...]) -> None:
        self._workers, self._labels = workers, labels

    def collect(self) -> Iterator[Metric]:
        labels, counted = self._labels, self._workers()
        for name, text, value in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for whose, each in counted.items():
                gauge.add_metric(whose, float(value(each)))
            yield gauge
        ended = CounterMetricFamily("offcut_requests", "Requests that ended.", labels=(*labels, "outcome"))
        gathers = CounterMetricFamily(
            "offcut_gathers", "Shallow calls by what their features cost.", labels=(*labels, "copied")
        )
        rows = HistogramMetricFamily(
            "offcut_batch_rows", "Rows of an engine call, without padding.", labels=(*labels, "kind")
        )
        seconds = CounterMetricFamily(
            "offcut_engine_seconds", "Time of the engine calls themselves.", labels=(*labels, "kind")
        )
        overhead = CounterMetricFamily(
            "offcut_overhead_seconds",
            "Time of engine calls beside the engines' own: choosing, copying in and out.",
            labels=labels,
        )
        for whose, each in counted.items():
            for outcome in OUTCOMES:
                total = each.requests.get(outcome)
                ended.add_metric((*whose, outcome), total.count if total else 0)
            gathers.add_metric((*whose, "yes"), each.gathers)
            gathers.add_metric((*whose, "no"), each.gathers_skipped)
            for kind in KINDS:
                ticks = {size: total for (name, size), total in each.ticks.items() if name == kind}
                counts = {size: total.count for size, total in ticks.items()}
                all_rows = sum(size * count for size, count in counts.items())
                rows.add_metric((*whose, kind), list(_buckets(counts)), all_rows)
                seconds.add_metric((*whose, kind), sum(total.seconds for total in ticks.values()))
            overhead.add_metric(whose, each.overhead.seconds)
        yield from (ended, gathers, rows, seconds, overhead)


_GAUGES: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("offcut_healthy", "Whether the engines work.", lambda each: each.healthy),
    ("offcut_queued_requests", "Requests that wait.", lambda each: each.queued),
    ("offcut_in_flight_requests", "Requests that are worked on.", lambda each: each.in_flight),
    ("offcut_cache_slots", "Requests that keep cached features.", lambda each: each.slots),
    ("offcut_cache_bytes", "Device memory of all cached features.", lambda each: each.cache_bytes),
    ("offcut_cache_limit_bytes", "Device memory that cached features may take.", lambda each: each.cache_limit),
)


def _buckets(counts: dict[int, int]) -> Iterable[tuple[str, int]]:
    bounds = [*ROWS, float("inf")]
    least = [0, *ROWS]
    each = [
        sum(count for size, count in counts.items() if low < size <= high)
        for low, high in zip(least, bounds, strict=True)
    ]
    names = [*(f"{bound:.1f}" for bound in ROWS), "+Inf"]
    return zip(names, accumulate(each), strict=True)
