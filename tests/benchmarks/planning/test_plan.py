"""``offcut bench plan``, and its simulator compared with a real worker."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

import offcut
from offcut.benchmarks.planning.capacity import arrivals
from offcut.benchmarks.planning.costs import DeviceCosts
from offcut.benchmarks.planning.measure import measure
from offcut.benchmarks.planning.simulate import RequestKind, WorkerSetting, simulate
from offcut.cli import app
from offcut.errors import UserError
from offcut.runtime.batching import Policy, Statistics, Worker
from offcut.runtime.generation.schedule import Uniform

REQUEST = {"prompt": "a red square", "num_inference_steps": 6, "guidance_scale": 5.0}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Any:
    pipe: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    pipe.set_progress_bar_config(disable=True)
    pipe.unet.advise = False
    yield pipe
    pipe.unet.close()


@pytest.fixture
def times(tmp_path: Path) -> Path:
    costs = DeviceCosts(
        model="m",
        engine="e",
        device="a device",
        height=512,
        width=512,
        cut="deepcache:0",
        rows=2,
        full={2: 0.05, 16: 0.2},
        shallow={2: 0.01, 16: 0.04},
        between={2: 0.001, 16: 0.003},
        encode=0.01,
        decode=0.05,
    )
    return costs.save(tmp_path / "times.json")


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["bench", "plan", *map(str, arguments)])


def serve(
    pipe: Any, schedule: Uniform, arrivals: list[float], setting: WorkerSetting
) -> tuple[list[float], Statistics]:
    """Let a worker serve requests that arrive at these seconds; return their latencies and its statistics."""
    ended: dict[int, float] = {}

    def note(index: int, _: object) -> None:
        ended[index] = time.perf_counter()

    limits = {name: getattr(setting, name) for name in ("max_in_flight", "max_queue", "max_batch", "policy")}
    with Worker(pipe, **limits) as worker:
        began = time.perf_counter()
        tickets = []
        for index, moment in enumerate(arrivals):
            time.sleep(max(0.0, began + moment - time.perf_counter()))
            tickets.append(worker.submit(REQUEST, schedule=schedule, cut="deepcache:0"))
            tickets[-1].future.add_done_callback(partial(note, index))
        for ticket in tickets:
            ticket.future.result()
        statistics = worker.statistics()
    return [ended[index] - began - moment for index, moment in enumerate(arrivals)], statistics


def test_the_simulator_predicts_what_a_worker_does(pipe: Any) -> None:
    """The bounds are wide, because other programs share the machine.

    Times are measured before and after the load, and the simulator gets their mean. The test has three attempts,
    because a machine that is busy for only a part of an attempt cannot be predicted.
    """
    schedule = Uniform(3)
    full = set(schedule.full_calls(6))
    kind = RequestKind(tuple(call in full for call in range(6)))
    setting = WorkerSetting(Policy(), max_in_flight=4, max_queue=20, max_batch=10**6)

    def measured() -> DeviceCosts:
        return measure(pipe, REQUEST, schedule, model="", device="", cut="deepcache:0", together=(1, 2, 4))

    def mean(one: DeviceCosts, other: DeviceCosts) -> DeviceCosts:
        tables = {
            name: {rows: (seconds + getattr(other, name)[rows]) / 2 for rows, seconds in getattr(one, name).items()}
            for name in ("full", "shallow", "between")
        }
        both = {"encode": (one.encode + other.encode) / 2, "decode": (one.decode + other.decode) / 2}
        return DeviceCosts(**one.model_dump() | tables | both)  # a copy would keep cached properties

    errors = []
    before = measured()
    for _ in range(3):
        most = simulate(before, [kind], [0.0] * 20, setting).throughput
        moments = arrivals(0.5 * most, 20)
        latencies, statistics = serve(pipe, schedule, moments, setting)
        after = measured()
        predicted = simulate(mean(before, after), [kind], moments, setting)
        before = after
        calls = statistics.ticks.values()
        engine = sum(total.seconds for total in calls) / sum(total.count for total in calls)
        assert 0 < statistics.overhead.mean < engine
        seconds = max(moment + latency for moment, latency in zip(moments, latencies, strict=True)) - moments[0]
        errors.append(
            (
                predicted.throughput / (len(latencies) / seconds) - 1,
                sum(predicted.latencies) / sum(latencies) - 1,
                predicted.mean_rows / statistics.mean_rows - 1,
            )
        )
        if all(abs(error) < most for error, most in zip(errors[-1], (0.5, 0.75, 0.4), strict=True)):
            return
    pytest.fail(f"errors of throughput, latency and rows: {errors}")


def test_devices_for_a_load_with_times_from_a_file(times: Path) -> None:
    done = plan("--times", times, "--arrival-rate", 20, "--p99", 3, "--steps", 20, "--requests", 400, "--json")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["devices"] >= 2
    assert answer["at"]["p99"] <= 3
    assert answer["devices"] * answer["capacity"] > 20 * 0.9
    rates = [point["rate"] for point in answer["curve"]]
    assert rates == sorted(rates)
    words = plan("--times", times, "--arrival-rate", 20, "--p99", 3, "--requests", 400)
    assert f"{answer['devices']} devices for 20 requests a second within 3 s" in " ".join(words.stdout.split())


def test_invalid_options_are_reported(times: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((), "give a bundle to measure, or --times FILE"),
        (("--times", times, "--export-times", tmp_path / "x"), "--times measures nothing"),
        (("--times", times, "--p99", 0.1), "alone on a device already takes"),
        (("--times", times, "--arrival-rate", 0), "give a rate above 0"),
    ):
        done = plan(*arguments)
        assert done.exit_code == 1
        assert isinstance(done.exception, UserError)
        assert message in str(done.exception)


def test_the_autoencoders_time_does_not_count_between_calls(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests that end together, one reaches the autoencoder before the others finish their last step."""
    decode = pipe.vae.decode

    def slowly(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.2)
        return decode(*args, **kwargs)

    monkeypatch.setattr(pipe.vae, "decode", slowly)
    arguments = {"prompt": "a red square", "num_inference_steps": 4, "guidance_scale": 3.0}
    costs = measure(pipe, arguments, Uniform(2), model="tiny", device="cpu", together=(4,), repeats=1)
    assert costs.decode > 0.2
    assert costs.between[8] < 0.15  # 3 of 4 autoencoders over 3 gaps would be 0.2


@pytest.mark.slow
def test_times_are_measured_and_written(tiny_bundle: Path, tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    options = ("--engine", "onnxruntime", "--threads", 1, "--steps", 4, "--max-in-flight", 2, "--requests", 200)
    done = plan(tiny_bundle, *options, "--arrival-rate", 1, "--p99", 60, "--export-times", file, "--json")
    assert done.exit_code == 0, done.output
    written = json.loads(file.read_text())
    assert json.loads(done.stdout)["times"] == written
    assert set(written["full"]) == set(written["shallow"]) == set(written["between"]) == {"2", "4"}
    assert written["height"] == written["width"] == 64
