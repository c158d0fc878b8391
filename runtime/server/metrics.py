"""Prometheus metrics in base units: worker statistics read at each scrape, and times that the server measures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from ..batching import Statistics
from .http import CODES

REQUEST_SECONDS_BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
STEP_SECONDS_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ROWS_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128)
"""Upper bounds of the histograms' buckets."""

OUTCOMES = ("done", "failed", "cancelled", "expired", "fault")
KINDS = ("full", "shallow")
SKIPPED = "skipped"

WorkerStatistics = Mapping[tuple[str, ...], Statistics]
"""Statistics of each worker, by the values of its labels."""


class ServerMetrics:
    """Metrics of one server, in a registry of its own.

    Args:
        statistics: called at each scrape for the statistics of every worker.
        labels: names of the labels that identify a worker; empty for a single worker.

    Attributes:
        registry: the registry, to which further metrics may be added.
        queue_seconds: time from a request's arrival until work on it began.
        step_seconds: time of a UNet call by kind, including the wait for the shared engine call.
        request_seconds: time from a request's arrival to its end, by outcome.
        rejections: requests that ended with an error reply, by error code.
    """

    def __init__(self, statistics: Callable[[], WorkerStatistics], labels: Sequence[str] = ()) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_WorkerCollector(statistics, tuple(labels)))
        ProcessCollector(registry=self.registry)
        self.queue_seconds = Histogram(
            "offcut_queue_seconds",
            "Time from a request's arrival until work on it began.",
            buckets=(0.001, 0.01, *REQUEST_SECONDS_BOUNDS),
            registry=self.registry,
        )
        self.step_seconds = Histogram(
            "offcut_step_seconds",
            "Time of a UNet call, including the wait for the shared engine call.",
            ["kind"],
            buckets=STEP_SECONDS_BOUNDS,
            registry=self.registry,
        )
        self.request_seconds = Histogram(
            "offcut_request_seconds",
            "Time from a request's arrival to its end.",
            ["outcome"],
            buckets=REQUEST_SECONDS_BOUNDS,
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
        """Return the metrics in Prometheus' text format."""
        return generate_latest(self.registry)


class ClusterMetrics(ServerMetrics):
    """Metrics of a cluster's ingress; the replicas' statistics have the labels ``replica`` and ``model``.

    Attributes:
        resends: requests that were sent again because a replica was lost or refused them.
    """

    def __init__(self, statistics: Callable[[], WorkerStatistics]) -> None:
        super().__init__(statistics, ("replica", "model"))
        self.resends = Counter(
            "offcut_resends_total",
            "Requests that were sent again because a replica was lost or refused them.",
            registry=self.registry,
        )


class _WorkerCollector(Collector):
    """Converts the statistics of the workers to metrics at each scrape."""

    def __init__(self, statistics: Callable[[], WorkerStatistics], labels: tuple[str, ...]) -> None:
        self._statistics, self._labels = statistics, labels

    def collect(self) -> Iterator[Metric]:
        labels, workers = self._labels, self._statistics()
        for name, help_text, value_of in _GAUGES:
            gauge = GaugeMetricFamily(name, help_text, labels=labels)
            for worker, statistics in workers.items():
                gauge.add_metric(worker, float(value_of(statistics)))
            yield gauge
        requests = CounterMetricFamily("offcut_requests", "Requests that ended.", labels=(*labels, "outcome"))
        gathers = CounterMetricFamily(
            "offcut_gathers", "Shallow calls, by whether their features had to be copied.", labels=(*labels, "copied")
        )
        rows = HistogramMetricFamily(
            "offcut_batch_rows", "Rows of an engine call, without padding.", labels=(*labels, "kind")
        )
        seconds = CounterMetricFamily("offcut_engine_seconds", "Time inside the engines.", labels=(*labels, "kind"))
        overhead = CounterMetricFamily(
            "offcut_overhead_seconds",
            "Time of engine calls outside the engines: choosing requests, copying in and out.",
            labels=labels,
        )
        for worker, statistics in workers.items():
            for outcome in OUTCOMES:
                total = statistics.requests.get(outcome)
                requests.add_metric((*worker, outcome), total.count if total else 0)
            gathers.add_metric((*worker, "yes"), statistics.gathers)
            gathers.add_metric((*worker, "no"), statistics.gathers_skipped)
            for kind in KINDS:
                calls = {size: total for (name, size), total in statistics.ticks.items() if name == kind}
                counts = {size: total.count for size, total in calls.items()}
                all_rows = sum(size * count for size, count in counts.items())
                rows.add_metric((*worker, kind), list(_buckets(counts)), all_rows)
                seconds.add_metric((*worker, kind), sum(total.seconds for total in calls.values()))
            overhead.add_metric(worker, statistics.overhead.seconds)
        yield from (requests, gathers, rows, seconds, overhead)


_GAUGES: tuple[tuple[str, str, Callable[[Statistics], float]], ...] = (
    ("offcut_healthy", "Whether the engines work.", lambda statistics: statistics.healthy),
    ("offcut_queued_requests", "Requests in the queue.", lambda statistics: statistics.queued),
    ("offcut_in_flight_requests", "Requests in progress.", lambda statistics: statistics.in_flight),
    ("offcut_cache_slots", "Trajectories that hold cached features.", lambda statistics: statistics.slots),
    ("offcut_cache_bytes", "Device memory of all cached features.", lambda statistics: statistics.cache_bytes),
    (
        "offcut_cache_limit_bytes",
        "Device memory that cached features may take.",
        lambda statistics: statistics.cache_limit,
    ),
)


def _buckets(counts: dict[int, int]) -> Iterable[tuple[str, int]]:
    """Return the upper bounds and cumulative counts of the histogram of batch rows.

    Args:
        counts: number of engine calls by number of rows.
    """
    upper = [*ROWS_BOUNDS, float("inf")]
    lower = [0, *ROWS_BOUNDS]
    in_bucket = [
        sum(count for size, count in counts.items() if low < size <= high)
        for low, high in zip(lower, upper, strict=True)
    ]
    names = [*(f"{bound:.1f}" for bound in ROWS_BOUNDS), "+Inf"]
    return zip(names, accumulate(in_bucket), strict=True)
