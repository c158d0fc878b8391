"""Figures from replies and memory samples: throughput, percentiles, growth, faults."""

from __future__ import annotations

from typing import Any

import pytest
from rich.console import Console

from offcut.benchmarks.report.blocks import for_terminal
from offcut.benchmarks.report.sections import serving
from offcut.benchmarks.schema.serving import BatchRow, ClosedRow, OpenRow, Overload, Percentiles, ServingLoad, Soak
from offcut.benchmarks.serving.client import Reply, Window
from offcut.benchmarks.serving.load_plan import LoadPlan
from offcut.benchmarks.serving.monitor import MemorySample, gauges, growth


def replies(*spans: tuple[float, float], status: int = 200) -> tuple[Reply, ...]:
    return tuple(Reply(begun, begun, ended, status) for begun, ended in spans)


def test_throughput_counts_shares_at_the_edges() -> None:
    """Two clients with images of 4 s get 5 images in a window of 10 s, wherever the window begins."""
    for shift in (0.0, 1.0, 2.5, 3.9):
        spans = [(4.0 * place, 4.0 * place + 4) for place in range(6)] * 2
        assert Window(replies(*spans), shift, shift + 10).throughput == pytest.approx(0.5)


def test_batches_that_end_together_do_not_change_the_throughput() -> None:
    spans = [(8.0 * place, 8.0 * place + 8) for place in range(4) for _ in range(8)]
    assert {round(Window(replies(*spans), at, at + 12).throughput, 6) for at in (0, 3, 7, 8, 12)} == {1.0}


def test_refusals_count_neither_for_throughput_nor_for_latency() -> None:
    window = Window(replies((0, 1)) + replies((1, 2), status=429), 0, 2)
    assert window.throughput == 0.5
    assert window.latencies == [1]


def test_latency_is_from_when_a_request_was_due() -> None:
    late = Reply(due=1.0, sent=3.0, ended=4.0, status=200)
    assert Window((late,), 0, 10).latencies == [3.0]


def test_percentiles_are_interpolated() -> None:
    p = Percentiles.of([float(value) for value in range(1, 101)])
    assert p is not None
    assert (p.p50, p.p90, p.p99, p.most, p.count) == pytest.approx((50.5, 90.1, 99.01, 100, 100))
    assert Percentiles.of([]) is None


def test_growth_omits_the_warm_up() -> None:
    steady = [MemorySample(place, 100 + (50 if place < 20 else 100) + place % 3, {}) for place in range(100)]
    first, last = growth(steady, 0.2)
    assert last - first == pytest.approx(0, abs=2)
    leaking = [MemorySample(place, 1000 * place, {}) for place in range(100)]
    first, last = growth(leaking, 0.2)
    assert last - first == pytest.approx(72_000, abs=2000)


def test_gauges_are_read_from_prometheus_text() -> None:
    text = "# HELP offcut_cache_slots x\noffcut_cache_slots 3.0\noffcut_queued_requests 2.0\nother 7.0\n"
    assert gauges(text) == {"offcut_cache_slots": 3.0, "offcut_queued_requests": 2.0}


def seconds(value: float) -> Percentiles:
    return Percentiles(p50=value, p90=value, p99=value, most=value, count=10)


def measured(**changed: Any) -> ServingLoad:
    """Return the result of a server without faults."""
    steady: dict[str, Any] = {"seconds": 1200, "warm_up": 0.2, "clients": 8, "requests": 900, "left": 40, "held": 0}
    steady |= {"statuses": {"0": 40, "200": 860}, "unexpected": 0}
    fields: dict[str, Any] = {
        "model": "m",
        "engine": "e",
        "threads": None,
        "request": {"steps": 20, "interval": 3},
        "in_flight": 8,
        "queue": 16,
        "rows": 16,
        "rounds": 2,
        "seconds": {"closed": 20},
        "closed": [
            ClosedRow(way=way, clients=16, throughput=rate, latency=seconds(1))
            for way, rate in (("steps", [1.4, 1.4]), ("single", [1.0, 1.0]), ("whole", [1.3, 1.4]))
        ],
        "open": [
            OpenRow(way=way, load=0.7, rates=[1, 1], p50=p50, latency=None, refused=0, late=None)
            for way, p50 in (("steps", [1.0, 1.0]), ("whole", [2.5, 2.5]))
        ],
        "overload": Overload(
            times=10,
            rate=14,
            seconds=120,
            capacity=1.4,
            throughput=1.3,
            at_capacity=seconds(10),
            accepted=seconds(11),
            refusals=seconds(0.01),
            late=None,
            client=0.25,
            places=24,
            taken=24,
            statuses={"200": 9, "429 queue_full": 90},
            unexpected=0,
        ),
        "soak": Soak(leak=0, first_bytes=10**9, last_bytes=10**9 + 10**6, most_bytes=2 * 10**9, **steady),
        "control": Soak(leak=1000, first_bytes=10**9, last_bytes=10**9 + 10**8, most_bytes=2 * 10**9, **steady),
    }
    return ServingLoad(**{**fields, **changed})


def test_a_server_without_unexpected_replies_has_no_faults() -> None:
    assert measured().faults == 0
    assert measured(closed=[], open=[], overload=None, soak=None, control=None).faults == 0


def test_unexpected_replies_and_held_requests_are_faults() -> None:
    load = measured()
    assert load.overload is not None
    assert load.soak is not None
    assert measured(overload=load.overload.model_copy(update={"unexpected": 1})).faults == 1
    assert measured(soak=load.soak.model_copy(update={"unexpected": 2})).faults == 2
    assert measured(soak=load.soak.model_copy(update={"held": 1})).faults == 1


def test_a_plan_estimates_its_duration() -> None:
    assert LoadPlan(parts=("overload",)).estimate == 60 + 120 + 8
    assert LoadPlan(parts=("load",), rounds=1, clients=(1,), loads=(0.5,)).estimate == 3 * (24 + 64)


def test_the_tables_show_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    batch = BatchRow(requests=2, rows=4, full=0.06, shallow=0.008, between=0.004)
    load = measured(batches=[batch], allowed=1.07, allowed_latency=1.093)
    console = Console(width=160, force_terminal=False)
    for block in for_terminal(serving(load)):
        console.print(block)
    output = capsys.readouterr().out
    for text in (
        "30.0 ms",
        "1.07\N{MULTIPLICATION SIGN}",
        "one at a time",
        "70 %",
        "14.0 requests",
        "takes 0.25 cores",
        "+100.0",
        "is 1.09\N{MULTIPLICATION SIGN} that of shared steps",
        "24 requests were in the server, which has 24 places",
        "neither an image nor a refusal: 0.",
    ):
        assert text in output
