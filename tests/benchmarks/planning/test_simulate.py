"""The simulator follows the worker's policy, with times in place of engines."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from offcut.benchmarks.planning import capacity
from offcut.benchmarks.planning.capacity import arrivals
from offcut.benchmarks.planning.costs import DeviceCosts, StepTimes, read
from offcut.benchmarks.planning.simulate import HORIZON, RequestKind, WorkerSetting, simulate
from offcut.errors import UserError
from offcut.runtime.batching import worker
from offcut.runtime.batching.policy import Policy

COSTS = DeviceCosts(
    model="m",
    engine="e",
    device="d",
    height=64,
    width=64,
    cut="deepcache:0",
    rows=2,
    full={2: 1.0, 4: 1.5, 16: 4.0},
    shallow={2: 0.2, 4: 0.3, 16: 0.8},
    between={2: 0.01, 4: 0.02},
    encode=0.1,
    decode=0.3,
)
KIND = RequestKind((True, False, False, True, False))
ONE = WorkerSetting(Policy())
LOAD = capacity.RequestLoad([KIND], requests=300)


def test_a_request_alone_takes_the_sum_of_its_times() -> None:
    outcome = simulate(COSTS, [KIND], [3.0], ONE)
    # The last gap does not count: the autoencoder follows the last call at once.
    assert outcome.latencies == pytest.approx([0.1 + 2 * 1.0 + 3 * 0.2 + 5 * 0.01 + 0.3])
    assert outcome.seconds == pytest.approx(outcome.latencies[0])
    assert outcome.utilisation == pytest.approx(1)
    assert (outcome.calls, outcome.mean_rows, outcome.rejected, outcome.queued) == (5, 2, 0, (0.0,))


def test_two_requests_at_once_share_every_call() -> None:
    outcome = simulate(COSTS, [KIND], [0.0, 0.0], ONE)
    assert outcome.calls == 5
    together = 2 * 0.1 + 2 * 1.5 + 3 * 0.3 + 5 * 0.02 + 0.3
    assert outcome.latencies == pytest.approx([together, together + 0.3])  # the autoencoder runs twice


def test_devices_share_the_load_and_the_queue_is_bounded() -> None:
    times = [0.0] * 8
    one, two = (simulate(COSTS, [KIND], times, replace(ONE, devices=n, max_in_flight=2)) for n in (1, 2))
    assert two.seconds == pytest.approx(one.seconds / 2)
    full = simulate(COSTS, [KIND], times, replace(ONE, max_in_flight=2, max_queue=1))
    assert full.rejected == 5
    assert len(full.latencies) == 3
    assert sorted(full.queued)[:2] == [0, 0]
    assert sorted(full.queued)[2] > 0


def test_the_simulator_has_the_workers_horizon() -> None:
    assert HORIZON == worker.HORIZON


@given(
    st.lists(st.floats(0, 60), min_size=1, max_size=40).map(sorted),
    st.lists(st.lists(st.booleans(), min_size=0, max_size=9).map(lambda rest: RequestKind((True, *rest))), min_size=1),
    st.integers(1, 4),
    st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_every_request_is_served_and_takes_at_least_its_own_time(
    times: list[float], kinds: list[RequestKind], devices: int, in_flight: int
) -> None:
    setting = WorkerSetting(Policy(), devices=devices, max_in_flight=in_flight, max_queue=99)
    outcome = simulate(COSTS, kinds, times, setting)
    shortest = min(simulate(COSTS, [kind], [0.0], ONE).latencies[0] for kind in kinds)
    assert len(outcome.latencies) == len(times)
    assert outcome.rejected == 0
    assert min(outcome.latencies) >= shortest - 1e-6
    assert outcome.utilisation <= 1 + 1e-9
    assert outcome.engine <= outcome.busy
    assert 2 <= outcome.mean_rows <= 2 * in_flight
    assert outcome == simulate(COSTS, kinds, times, setting)


@given(st.floats(0.1, 50), st.integers(200, 2000), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_arrivals_come_in_order_and_at_their_rate(rate: float, count: int, seed: int) -> None:
    times = arrivals(rate, count, seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times == arrivals(rate, count, seed)
    assert times[-1] * rate == pytest.approx(count, rel=0.3)


def test_devices_for_returns_the_smallest_sufficient_number() -> None:
    load = capacity.RequestLoad([KIND], requests=300)
    devices, outcome = capacity.devices_for(COSTS, load, ONE, rate=4.0, p99=9.0)
    assert devices > 1
    assert outcome.devices == devices
    assert outcome.percentile(99, capacity.WARMUP) <= 9.0
    fewer = load.on(COSTS, replace(ONE, devices=devices - 1), 4.0)
    assert fewer.percentile(99, capacity.WARMUP) > 9.0
    with pytest.raises(UserError, match=r"alone on a device already takes 3\.05 s"):
        capacity.devices_for(COSTS, load, ONE, rate=4.0, p99=3.0)


def test_latency_rises_towards_the_capacity_of_a_device() -> None:
    load = capacity.RequestLoad([KIND], requests=400)
    points = capacity.curve(COSTS, load, replace(ONE, max_queue=400))
    p99 = [result.percentile(99) for _, result in points]
    assert p99[0] < p99[3] < p99[-1]
    busy = [result.utilisation for _, result in points]
    assert busy[0] < busy[-1]
    assert points[-1][0] == pytest.approx(capacity.capacity(COSTS, load, ONE))


def test_no_request_joins_a_batch_of_whole_requests() -> None:
    times = [0.0, 0.5, 0.5]
    joining, whole = (simulate(COSTS, [KIND], times, replace(ONE, whole_requests=flag)) for flag in (False, True))
    alone = simulate(COSTS, [KIND], [0.0], ONE).latencies[0]
    assert whole.latencies[0] == pytest.approx(alone)
    assert whole.queued == pytest.approx([0, alone - 0.5, alone - 0.5])
    assert whole.calls == 10
    assert joining.seconds < whole.seconds
    rate = 0.8 * capacity.capacity(COSTS, LOAD, ONE)
    assert LOAD.on(COSTS, ONE, rate).percentile(50) < LOAD.on(
        COSTS, replace(ONE, whole_requests=True), rate
    ).percentile(50)
    assert LOAD.on(COSTS, replace(ONE, max_in_flight=1), rate).mean_rows == 2


def test_thousands_of_devices_are_simulated() -> None:
    load = capacity.RequestLoad([KIND], requests=6000)
    outcome = load.on(COSTS, replace(ONE, devices=3000), 900.0)
    assert outcome.rejected == 0
    assert outcome.percentile(99) < 4


def test_times_are_read_back_and_others_are_refused(tmp_path: Path) -> None:
    path = COSTS.save(tmp_path / "times.json")
    assert read(path) == COSTS
    path.write_text(path.read_text().replace('"encode": 0.1', '"encode": -1'))
    with pytest.raises(UserError, match="holds no times of offcut bench plan: encode"):
        read(path)
    path.write_text(COSTS.model_copy(update={"full": {2: 0.0}}).model_dump_json())
    with pytest.raises(UserError, match="more than 0 seconds"):
        read(path)
    with pytest.raises(UserError, match="give the file that --export-times wrote"):
        read(tmp_path / "none.json")


def test_durations_are_interpolated_and_extrapolated() -> None:
    times = StepTimes({None: {2: 1.0, 4: 2.0, 8: 3.0}, "deepcache:0": {2: 0.5}, "mlperf": {1: 2.0, 4: 0.5}})
    assert [times.seconds(None, rows) for rows in (2, 3, 6, 8, 12)] == [1.0, 1.5, 2.5, 3.0, 4.0]
    assert times.seconds(None, 1) == 0.5
    assert times.seconds("deepcache:0", 4) == 1.0
    assert times.seconds("mlperf", 8) == 0.5  # never below what was measured


@given(st.dictionaries(st.integers(1, 32), st.floats(0.01, 5), min_size=1), st.integers(1, 64))
def test_every_call_takes_time(table: dict[int, float], rows: int) -> None:
    assert StepTimes({None: table}).seconds(None, rows) > 0
