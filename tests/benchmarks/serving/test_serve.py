"""``offcut bench serve`` on a small model with short windows, and its baseline alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import offcut
from offcut.benchmarks import record
from offcut.benchmarks.serving.load_plan import LoadPlan, ServerSetting
from offcut.benchmarks.serving.measured_server import MeasuredServer
from offcut.benchmarks.serving.phases import run
from offcut.benchmarks.serving.whole_requests import WholeRequests
from offcut.cli import app
from offcut.errors import QueueFullError, RequestCancelledError, UserError, WorkerClosedError
from offcut.runtime.batching import Worker
from offcut.runtime.generation.schedule import Uniform

SHORT = ("--rounds", 1, "--clients", 1, "--clients", 3, "--closed", 1, "--open", 1, "--settle", 0.3, "--load", 0.7)
SMALL = ("--steps", 4, "--warmup", 1, "--threads", 1, "--max-in-flight", 2, "--max-queue", 1, "--engine", "onnxruntime")


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[Any]:
    made: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    made.set_progress_bar_config(disable=True)
    made.unet.advise = False
    yield made
    made.unet.close()


def asked(seed: int, **changed: Any) -> dict[str, Any]:
    arguments = {"prompt": "a red square", "num_inference_steps": 4, "guidance_scale": 3.0, **changed}
    return {**arguments, "generator": [torch.Generator().manual_seed(seed)]}


def test_whole_requests_run_as_one_batch_with_the_images_of_each(pipe: Any) -> None:
    pipe.unet.set_schedule(Uniform(2))
    alone = [np.asarray(pipe(**asked(seed)).images[0], dtype=int) for seed in (1, 2)]
    pipe.unet.set_schedule(None)
    whole = WholeRequests(Worker(pipe, max_in_flight=1, max_queue=0), most=3, max_queue=2)
    try:
        made: list[int] = []
        first = whole.submit(asked(9), schedule=Uniform(2))
        together = [
            whole.submit(asked(seed), schedule=Uniform(2), on_step=lambda step: made.append(step.rows))
            for seed in (1, 2)
        ]
        other = whole.submit(asked(3, num_inference_steps=3), schedule=Uniform(2))
        images = [ticket.future.result(60).images for ticket in (first, *together, other)]
        assert [len(each) for each in images] == [1] * 4
        for drawn, expected in zip(images[1:3], alone, strict=True):
            assert np.abs(np.asarray(drawn[0], dtype=int) - expected).max() <= 1
        # The first request ran alone, and the others in batches of six rows. A request gets an event for every step of
        # its batch.
        assert made in ([4] * 8, [6] * 8)
        counted = whole.statistics()
        assert counted.requests["done"].count == 4
        assert (counted.queued, counted.in_flight) == (0, 0)
    finally:
        whole.close()
    with pytest.raises(WorkerClosedError):
        whole.submit(asked(1))


def test_whole_requests_have_a_bounded_queue(pipe: Any) -> None:
    whole = WholeRequests(Worker(pipe, max_in_flight=1, max_queue=0), most=1, max_queue=1)
    try:
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            long = whole.submit(asked(1, num_inference_steps=60))
            waiting = whole.submit(asked(2))
            with pytest.raises(QueueFullError):
                whole.submit(asked(3))
            waiting.cancel()
            with pytest.raises(RequestCancelledError):
                waiting.future.result(60)
            again = whole.submit(asked(4))
            assert pool.submit(long.future.result).result(60).images
            assert again.future.result(60).images
    finally:
        whole.close()


def test_a_server_that_does_not_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an offcut bundle"), MeasuredServer(ServerSetting(tmp_path), "steps"):
        pass


def test_more_clients_than_places_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UserError, match="16 clients find only 3 places"):
        run(ServerSetting(tiny_bundle, in_flight=2, queue=1), LoadPlan())


@pytest.mark.slow
def test_every_way_to_batch_is_measured(tiny_bundle: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(
        app,
        [
            *("bench", "serve", str(tiny_bundle), "--part", "load", "--size", "64", "-o", str(tmp_path), "--json"),
            *map(str, SHORT + SMALL),
        ],
    )
    assert done.exit_code == 0, done.output
    found = record.read(tmp_path).serving
    assert found is not None
    assert json.loads(done.stdout)["serving"] == json.loads(found.model_dump_json())
    assert {(row.way, row.clients) for row in found.closed} == {
        (way, clients) for way in ("steps", "single", "whole") for clients in (1, 3)
    }
    assert all(rate > 0 for row in found.closed for rate in row.throughput)
    assert found.request["size"] == 64
    assert {row.way for row in found.open} == {"steps", "single", "whole"}
    assert [row.requests for row in found.batches] == [1, 2]
    assert found.allowed is not None
    assert found.allowed > 0.3
    assert found.allowed_latency is not None
    assert found.allowed_latency > 0.1
    assert "The server under load" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_overload_is_refused_and_a_leak_is_noticed(tiny_bundle: Path) -> None:
    serving = ServerSetting(tiny_bundle, steps=4, warmup=1, in_flight=2, queue=1, threads=1, engine="onnxruntime")
    plan = LoadPlan(
        parts=("overload", "soak"),
        settle=0.3,
        capacity=1,
        overload=2,
        soak=3,
        control=3,
        soak_clients=2,
        leaving=0.3,
        leak=60_000_000,
    )
    messages: list[str] = []
    found = run(serving, plan, messages.append)
    over, soak, control = found.overload, found.soak, found.control
    assert over is not None
    assert soak is not None
    assert control is not None
    assert over.refusals is not None
    assert over.refusals.count == over.statuses["429 queue_full"]
    assert over.unexpected == 0
    assert 0 < over.taken <= over.places == 3
    assert over.client is not None
    assert 0 < over.client < 2
    assert (soak.unexpected, soak.held) == (0, 0), soak.statuses
    assert 0 < soak.left < soak.requests
    assert control.growth > soak.growth
    assert control.growth > 50_000_000
    assert any(text.startswith("  ") and "MB" in text for text in messages)
