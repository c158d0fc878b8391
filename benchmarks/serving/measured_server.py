"""The server under test in a child process: the server of ``offcut serve``, also with other ways to batch."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, cast

from ...errors import InternalError, UserError
from ..schema.serving import Way
from ..worker_process import Channel, RequestFailed, WorkerProcess, describe_error
from .load_plan import ServerSetting

if TYPE_CHECKING:
    from ...runtime.batching import Worker
    from ...runtime.server.service import WorkerService

NAME = "measured"
"""Name of the served model."""

_TIMEOUT = 3600.0
"""Seconds until the server gives a request up; longer than any queue here."""

_GRACE = 60.0
"""Seconds that a server may take to end."""


class MeasuredServer:
    """A server that runs inside its context.

    Args:
        setting: settings of the server.
        way: how the server batches.
        leak: bytes that the server leaks at each request, as a control that growing memory is noticed.

    Raises:
        UserError: the server does not start; the message has the reason.
    """

    def __init__(self, setting: ServerSetting, way: Way, leak: int = 0) -> None:
        self._setting, self._way, self._leak = setting, way, leak
        self.url = ""
        self.engine = ""
        self.pid = 0

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="offcut-server-")
        self._process = WorkerProcess(__name__, Path(self._folder.name) / "log", _TIMEOUT)
        setting = asdict(self._setting) | {"bundle": str(self._setting.bundle.resolve())}
        try:
            started = self._process.request("start", setting=setting, way=self._way, leak=self._leak)
        except RequestFailed as error:
            self._process.close()
            self._folder.cleanup()
            raise UserError(f"the measured server did not start: {error}") from error
        self.url, self.engine = f"http://127.0.0.1:{started['port']}", str(started["engine"])
        self.pid = self._process.pid or 0
        return self

    def __exit__(self, *raised: object) -> None:
        code = self._process.close(_GRACE)
        line = self._process.last_log_line()
        self._folder.cleanup()
        if code and raised[0] is None:
            raise InternalError(f"the measured server ended with exit code {code}: {line}")


def main() -> int:
    """Serve until the parent closes the input; the reply to the only request is the port."""
    from ...runtime.server.run import listen, serve

    service: WorkerService | None = None

    def parent_gone() -> None:
        if service is not None:
            service.stopping = True

    channel = Channel(parent_gone)
    request = next(iter(channel))
    try:
        setting = ServerSetting(**request["setting"] | {"bundle": Path(request["setting"]["bundle"])})
        service, engine = _service(setting, request["way"], request["leak"])
    except Exception as error:
        channel.send("error", describe_error(error))
        return 1
    serve(service, listen("127.0.0.1", 0), lambda port: channel.send("ok", {"port": port, "engine": engine}))
    return 0


def _service(setting: ServerSetting, way: Way, leak: int) -> tuple[WorkerService, str]:
    """Return the service and the name of its engine."""
    from ...engines.bundle.bundle import Bundle
    from ...runtime.pipeline import load
    from ...runtime.server.models import ServedModel
    from ...runtime.server.service import WorkerService
    from ...runtime.server.settings import ServeSettings

    bundle = Bundle.open(setting.bundle)
    engine = bundle.choose_engine(setting.engine, setting.device).name
    pipe: Any = load(bundle, engine, device=setting.device, threads=setting.threads)
    model = ServedModel.from_bundle(pipe, bundle, engine, setting.device, NAME)
    model.warm_up(setting.guidance)
    defaults = {name: getattr(setting, name) for name in ("steps", "guidance", "interval", "warmup")}
    settings = ServeSettings(timeout=_TIMEOUT, drain=_GRACE / 2, **defaults)
    service = WorkerService(_worker(pipe, setting, way), model, settings)
    if leak:
        _leak_at_each_request(service, leak)
    return service, engine


def _worker(pipe: Any, setting: ServerSetting, way: Way) -> Worker:
    from ...runtime.batching import Worker
    from .whole_requests import WholeRequests

    if way == "whole":
        inner = Worker(pipe, max_in_flight=1, max_queue=0, max_batch=setting.rows)
        # WholeRequests has the methods of Worker that the server calls.
        return cast("Worker", WholeRequests(inner, setting.in_flight, setting.queue))
    in_flight = 1 if way == "single" else setting.in_flight
    return Worker(pipe, max_in_flight=in_flight, max_queue=setting.places - in_flight, max_batch=setting.rows)


def _leak_at_each_request(service: WorkerService, count: int) -> None:
    leaked: list[bytes] = []
    submit = service.submit

    def leaking(body: Any) -> Any:
        leaked.append(b"\1" * count)  # nonzero bytes, because the system counts only written memory
        return submit(body)

    service.submit = leaking  # type: ignore[method-assign]


if __name__ == "__main__":
    raise SystemExit(main())
