"""Fixtures: a real server (uvicorn on a free port, in a thread) around a real worker and a small bundle's engines."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

import offcut
from offcut.engines.onnxruntime.pair import BoundOnnxRuntimePair
from offcut.errors import OffcutError
from offcut.runtime.batching import Worker
from offcut.runtime.server.models import ServedModel
from offcut.runtime.server.run import listen, serve
from offcut.runtime.server.service import WorkerService
from offcut.runtime.server.settings import ServeSettings

FEW_STEPS = ServeSettings(steps=6, interval=3, warmup=0, guidance=5.0)


@dataclass
class RunningServer:
    """A server that runs in a thread.

    Attributes:
        errors: exceptions with which the server ended.
    """

    service: WorkerService
    url: str
    thread: threading.Thread
    errors: list[OffcutError] = field(default_factory=list)

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(f"{self.url}/v1/images/generations", timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)


Start = Callable[..., Any]


@contextmanager
def run_server(
    pipe: Any, settings: ServeSettings = FEW_STEPS, bundle: Any = None, **options: Any
) -> Iterator[RunningServer]:
    """Run a server in a thread until the end of the context."""
    model = ServedModel(pipe, "tiny", multiple=8, bundle=bundle)
    worker = Worker(pipe, **{"max_in_flight": 4, **options})
    service = WorkerService(worker, model, settings)
    address, listening = listen("127.0.0.1", 0), threading.Event()
    running = RunningServer(service, f"http://127.0.0.1:{address.getsockname()[1]}", threading.Thread())

    def run() -> None:
        try:
            serve(service, address, lambda port: listening.set())
        except OffcutError as error:
            running.errors.append(error)

    running.thread = threading.Thread(target=run, name="server")
    running.thread.start()
    try:
        assert listening.wait(60)
        yield running
    finally:
        service.stopping = True
        running.thread.join(60)
        worker.close()  # after a fault the worker is still open; otherwise this has no effect
        assert not running.thread.is_alive()


@pytest.fixture(scope="package")
def pipe(tiny_bundle: Path) -> Iterator[Any]:
    """The pipeline that the servers of all tests run, one server at a time."""
    loaded: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    loaded.set_progress_bar_config(disable=True)
    yield loaded
    loaded.unet.close()


@pytest.fixture(scope="package")
def start_server(pipe: Any) -> Start:
    """Function that starts a server with settings and worker options; one at a time."""
    return lambda *settings, **options: run_server(pipe, *settings, **options)


@pytest.fixture(scope="module")
def server(start_server: Start) -> Iterator[RunningServer]:
    """One server for all tests of a module that leave it unchanged."""
    with start_server() as running:
        yield running


class Gate:
    """A gate before every engine call. A closed gate blocks the next call, and then sets ``reached``."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def close(self) -> None:
        self.reached.clear()
        self.open.clear()

    def wait(self) -> None:
        if not self.open.is_set():
            self.reached.set()
            assert self.open.wait(60)
        self.calls += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    real_full, real_shallow = BoundOnnxRuntimePair.full, BoundOnnxRuntimePair.shallow

    def full(self: BoundOnnxRuntimePair) -> None:
        gate.wait()
        real_full(self)

    def shallow(self: BoundOnnxRuntimePair, cut: str) -> None:
        gate.wait()
        real_shallow(self, cut)

    monkeypatch.setattr(BoundOnnxRuntimePair, "full", full)
    monkeypatch.setattr(BoundOnnxRuntimePair, "shallow", shallow)
    yield gate
    gate.open.set()


@pytest.fixture
def wait_until() -> Callable[[Callable[[], bool]], None]:
    """Function that waits until a condition holds."""

    def wait(condition: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, "the condition does not hold in time"
            time.sleep(0.01)

    return wait
