"""The server that is measured, in a process of its own: ``offcut serve``'s, and the same with other ways to batch."""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, Self, cast, get_args

from ...errors import InternalError, UserError

if TYPE_CHECKING:
    from ...runtime.batching import Worker
    from ...runtime.server.service import WorkerService

Way = Literal["steps", "single", "whole"]
"""``steps``: the worker as it is; ``single``: one request at a time; ``whole``: batches of whole requests."""

NAME = "measured"
"""Of the model, for clients."""

_TIMEOUT = 3600.0
"""Seconds until a request is given up: longer than any queue here, so that none is."""

_ENDING = 60.0


@dataclass(frozen=True)
class Serving:
    """How the measured servers are set.

    Attributes:
        bundle: what they serve.
        steps, interval, warmup, guidance: for requests, which say nothing of it.
        size: side of the images in pixels, which requests say; None for the model's own.
        in_flight: requests that are worked on at once, or in one batch of whole requests.
        queue: requests that wait beside them.
        rows: most rows of an engine call.
    """

    bundle: Path
    steps: int = 20
    interval: int = 3
    warmup: int = 2
    guidance: float = 3.0
    size: int | None = None
    in_flight: int = 8
    queue: int = 16
    rows: int = 16
    engine: str = "auto"
    device: str = "cpu"
    threads: int | None = None


class Process:
    """A server that runs while its context does.

    Args:
        serving: its settings.
        way: how it batches.
        leak: bytes that it keeps for good at each request: a control, to see that memory that grows is noticed.

    Raises:
        UserError: it does not start; the message has what it said last.
    """

    def __init__(self, serving: Serving, way: Way, leak: int = 0) -> None:
        given = {
            "--steps": serving.steps,
            "--interval": serving.interval,
            "--warmup": serving.warmup,
            "--guidance": serving.guidance,
            "--in-flight": serving.in_flight,
            "--queue": serving.queue,
            "--rows": serving.rows,
            "--engine": serving.engine,
            "--device": serving.device,
            "--way": way,
            "--leak": leak,
            **({} if serving.threads is None else {"--threads": serving.threads}),
        }
        options = [text for name, value in given.items() for text in (name, str(value))]
        self._command = [sys.executable, "-m", __name__, str(serving.bundle.resolve()), *options]
        self.way = way
        self.url = ""
        self.engine = ""

    def __enter__(self) -> Self:
        self._log: IO[bytes] = tempfile.TemporaryFile()
        self._process = subprocess.Popen(self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)
        assert self._process.stdout is not None
        said = self._process.stdout.readline()
        if not said:
            self._process.wait()
            raise UserError(f"the server that was to be measured did not start: {self._last_words()}")
        told: dict[str, Any] = json.loads(said)
        self.url, self.engine = f"http://127.0.0.1:{told['port']}", str(told["engine"])
        return self

    def __exit__(self, *raised: object) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(_ENDING)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        words = self._last_words()
        self._log.close()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
        if self._process.returncode and raised[0] is None:
            raise InternalError(f"the measured server ended with exit code {self._process.returncode}: {words}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def _last_words(self) -> str:
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def main(given: Sequence[str] | None = None) -> int:
    """The process: it says its port in a line of JSON, and serves until SIGTERM."""
    from ...engines.bundle.bundle import Bundle
    from ...runtime.pipeline import load
    from ...runtime.server.models import ServedModel
    from ...runtime.server.run import listen, serve
    from ...runtime.server.service import WorkerService
    from ...runtime.server.settings import ServeSettings

    options = _parser().parse_args(given)
    try:
        opened = Bundle.open(options.bundle)
        choice = opened.choose_engine(options.engine, options.device)
        pipe: Any = load(opened, choice.name, device=options.device, threads=options.threads)
        model = ServedModel.from_bundle(pipe, opened, choice.name, options.device, NAME)
        model.warm_up(options.guidance)
        worker = _worker(pipe, options)
        settings = ServeSettings(
            timeout=_TIMEOUT,
            drain=_ENDING / 2,
            steps=options.steps,
            guidance=options.guidance,
            interval=options.interval,
            warmup=options.warmup,
        )
        service = WorkerService(worker, model, settings)
        if options.leak:
            _leak(service, options.leak)
        threading.Thread(target=_end_with_parent, args=(service,), daemon=True).start()
        serve(
            service,
            listen("127.0.0.1", 0),
            lambda port: print(json.dumps({"port": port, "engine": choice.name}), flush=True),
        )
    except UserError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--way", choices=get_args(Way), default="steps")
    for name, kind, default in (
        ("steps", int, 20),
        ("interval", int, 3),
        ("warmup", int, 2),
        ("guidance", float, 3.0),
        ("in-flight", int, 8),
        ("queue", int, 16),
        ("rows", int, 16),
        ("engine", str, "auto"),
        ("device", str, "cpu"),
        ("threads", int, None),
    ):
        parser.add_argument(f"--{name}", type=kind, default=default)
    parser.add_argument("--leak", type=int, default=0, help="bytes kept for good at each request; a control")
    return parser


def _worker(pipe: Any, options: argparse.Namespace) -> Worker:
    from ...runtime.batching import Worker
    from .whole import WholeRequests

    places = options.in_flight + options.queue  # that requests have altogether: the same for all ways
    if options.way == "whole":
        inner = Worker(pipe, max_in_flight=1, max_queue=0, max_batch=options.rows)
        # The same methods, as far as a server calls them.
        return cast(Worker, WholeRequests(inner, options.in_flight, options.queue))
    in_flight = 1 if options.way == "single" else options.in_flight
    return Worker(pipe, max_in_flight=in_flight, max_queue=places - in_flight, max_batch=options.rows)


def _end_with_parent(service: WorkerService) -> None:
    """Who started this process holds its standard input open, and no longer does once it is gone, however it went."""
    while os.read(0, 1):  # not sys.stdin, whose lock the interpreter wants at its end
        pass
    service.stopping = True


def _leak(service: WorkerService, count: int) -> None:
    kept: list[bytes] = []
    draw = service.draw

    def leaking(body: Any) -> Any:
        kept.append(b"\1" * count)  # written to, or the system would not count it
        return draw(body)

    service.draw = leaking  # type: ignore[method-assign]


if __name__ == "__main__":
    raise SystemExit(main())
