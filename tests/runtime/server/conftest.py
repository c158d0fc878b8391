"""A real server, uvicorn on a free port in a thread, around a real worker and the engines of a small bundle."""

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

BRIEF = ServeSettings(steps=6, interval=3, warmup=0, guidance=5.0)


@dataclass
class Running:
    """A server that runs.

    Attributes:
        error: with which it ended.
    """

    service: WorkerService
    url: str
    thread: threading.Thread
    error: list[OffcutError] = field(default_factory=list)

    def post(self, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["json"] = body
        return httpx.post(f"{self.url}/v1/images/generations", timeout=60, **options)

    def get(self, path: str, **options: Any) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=60, **options)


Start = Callable[..., Any]


@contextmanager
def start(pipe: Any, settings: ServeSettings = BRIEF, bundle: Any = None, **options: Any) -> Iterator[Running]:
    served = ServedModel(pipe, "tiny", multiple=8, bundle=bundle)
    worker = Worker(pipe, **{"max_in_flight": 4, **options})
    service = WorkerService(worker, served, settings)
    address, listening = listen("127.0.0.1", 0), threading.Event()
    running = Running(service, f"http://127.0.0.1:{address.getsockname()[1]}", threading.Thread())

    def run() -> None:
        try:
            serve(service, address, lambda port: listening.set())
        except OffcutError as error:
            running.error.append(error)

    running.thread = threading.Thread(target=run, name="server")
    running.thread.start()
    try:
        assert listening.wait(60)
        yield running
    finally:
        service.stopping = True
        running.thread.join(60)
        worker.close()  # again, or after a fault
        assert not running.thread.is_alive()


@pytest.fixture(scope="package")
def pipe(tiny_bundle: Path) -> Iterator[Any]:
    """The pipeline that servers run; between tests no server has it."""
    made: Any = offcut.load(tiny_bundle, "onnxruntime", threads=1)
    made.set_progress_bar_config(disable=True)
    yield made
    made.unet.close()


@pytest.fixture(scope="package")
def begin(pipe: Any) -> Start:
    """Starts a server with settings and options of the worker; one at a time."""
    return lambda *settings, **options: start(pipe, *settings, **options)


@pytest.fixture(scope="module")
def server(begin: Start) -> Iterator[Running]:
    """One for all tests of a module that leave it as it was."""
    with begin() as running:
        yield running


class Gate:
    """Before every engine call; closed, it holds the engines there, and ``reached`` says that it does."""

    def __init__(self) -> None:
        self.calls = 0
        self.error: Exception | None = None
        self.reached, self.open = threading.Event(), threading.Event()
        self.open.set()

    def close(self) -> None:
        self.reached.clear()
        self.open.clear()

    def passes(self) -> None:
        if not self.open.is_set():
            self.reached.set()
            assert self.open.wait(60)
        self.calls += 1
        if self.error is not None:
            raise self.error


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate()
    real_full, real_shallow = BoundOnnxRuntimePair.full, BoundOnnxRuntimePair.shallow

    def full(self: BoundOnnxRuntimePair) -> None:
        made.passes()
        real_full(self)

    def shallow(self: BoundOnnxRuntimePair, cut: str) -> None:
        made.passes()
        real_shallow(self, cut)

    monkeypatch.setattr(BoundOnnxRuntimePair, "full", full)
    monkeypatch.setattr(BoundOnnxRuntimePair, "shallow", shallow)
    yield made
    made.open.set()


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Waits until something is so."""

    def wait(so: Callable[[], bool], seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while not so():
            assert time.monotonic() < deadline, "it did not come to be"
            time.sleep(0.01)

    return wait
