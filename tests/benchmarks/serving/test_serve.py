"""``offcut bench serve`` on a small model with short windows, and the baseline ``WholeRequests`` alone."""

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
    loaded: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    loaded.set_progress_bar_config(disable=True)
    loaded.unet.advise = False
    yield loaded
    loaded.unet.close()


def arguments_of(seed: int, **changed: Any) -> dict[str, Any]:
    arguments = {"prompt": "a red square", "num_inference_steps": 4, "guidance_scale": 3.0, **changed}
    return {**arguments, "generator": [torch.Generator().manual_seed(seed)]}


def test_a_batch_of_whole_requests_gives_each_request_its_images(pipe: Any) -> None:
    pipe.unet.set_schedule(Uniform(2))
    alone = [np.asarray(pipe(**arguments_of(seed)).images[0], dtype=int) for seed in (1, 2)]
    pipe.unet.set_schedule(None)
    worker = WholeRequests(Worker(pipe, max_in_flight=1, max_queue=0), max_batch=3, max_queue=2)
    try:
        step_rows: list[int] = []
        first = worker.submit(arguments_of(9), schedule=Uniform(2))
        together = [
            worker.submit(arguments_of(seed), schedule=Uniform(2), on_step=lambda step: step_rows.append(step.rows))
            for seed in (1, 2)
        ]
        other = worker.submit(arguments_of(3, num_inference_steps=3), schedule=Uniform(2))
        images = [ticket.future.result(60).images for ticket in (first, *together, other)]
        assert [len(request_images) for request_images in images] == [1] * 4
        for shared, expected in zip(images[1:3], alone, strict=True):
            assert np.abs(np.asarray(shared[0], dtype=int) - expected).max() <= 1
        # Four rows if the first request ran alone, else six. Each request gets every step of its batch.
        assert step_rows in ([4] * 8, [6] * 8)
        counted = worker.statistics()
        assert counted.requests["done"].count == 4
        assert (counted.queued, counted.in_flight) == (0, 0)
    finally:
        worker.close()
    with pytest.raises(WorkerClosedError):
        worker.submit(arguments_of(1))


def test_whole_requests_have_a_bounded_queue(pipe: Any) -> None:
    worker = WholeRequests(Worker(pipe, max_in_flight=1, max_queue=0), max_batch=1, max_queue=1)
    try:
        with ThreadPoolExecutor(1) as pool, torch.no_grad():
            long = worker.submit(arguments_of(1, num_inference_steps=60))
            waiting = worker.submit(arguments_of(2))
            with pytest.raises(QueueFullError):
                worker.submit(arguments_of(3))
            waiting.cancel()
            with pytest.raises(RequestCancelledError):
                waiting.future.result(60)
            fourth = worker.submit(arguments_of(4))
            assert pool.submit(long.future.result).result(60).images
            assert fourth.future.result(60).images
    finally:
        worker.close()


def test_a_server_that_does_not_start_is_an_error_with_its_reason(tmp_path: Path) -> None:
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
    section = record.read(tmp_path).serving
    assert section is not None
    assert json.loads(done.stdout)["serving"] == json.loads(section.model_dump_json())
    assert {(row.way, row.clients) for row in section.closed} == {
        (way, clients) for way in ("steps", "single", "whole") for clients in (1, 3)
    }
    assert all(rate > 0 for row in section.closed for rate in row.throughput)
    assert section.request["size"] == 64
    assert {row.way for row in section.open} == {"steps", "single", "whole"}
    assert [row.requests for row in section.batches] == [1, 2]
    assert section.allowed is not None
    assert section.allowed > 0.3
    assert section.allowed_latency is not None
    assert section.allowed_latency > 0.1
    assert "The server under load" in (tmp_path / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_an_overloaded_server_refuses_and_a_leak_is_measured(tiny_bundle: Path) -> None:
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
    load = run(serving, plan, messages.append)
    over, soak, control = load.overload, load.soak, load.control
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
