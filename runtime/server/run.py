"""The server process: uvicorn around a worker, signals, and shutdown after a fault."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ...errors import EngineFaultError, UserError
from .app import create_app
from .connections import ConnectionLimits, protocol_class
from .service import WorkerService, log

_SHUTDOWN_SECONDS = 10
"""Time for clients to read their replies after the last job has ended."""


class ImageServer(uvicorn.Server):
    """uvicorn around a service. After a signal it refuses new requests, and ends when the others are done.

    Args:
        service: the service.
        on_listening: called with the port once requests are accepted.
        limits: limits of connections; by default those that fit this process.
    """

    def __init__(
        self,
        service: WorkerService,
        on_listening: Callable[[int], None] = lambda port: None,
        limits: ConnectionLimits | None = None,
    ) -> None:
        limits = limits or ConnectionLimits.for_process()
        config = uvicorn.Config(
            create_app(service),
            http=protocol_class(limits, service.settings.limits.body_bytes, service.count_problem),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            timeout_keep_alive=int(limits.idle_seconds),
            timeout_graceful_shutdown=_SHUTDOWN_SECONDS,
        )
        super().__init__(config)
        self._service, self._on_listening = service, on_listening
        self._watch_task: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watch_task = asyncio.create_task(self._watch())
        self._on_listening(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watch_task is not None:
            self._watch_task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch_task
        await super().shutdown(sockets)

    async def _watch(self) -> None:
        try:
            await self._service.watch(self._request_exit)
        except Exception:
            log.exception("the task that watches the worker failed, so the server ends")
            self._service.stopping = True
            self._request_exit()
            raise

    def _request_exit(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Let requests finish after the first signal, and end at once after the second.

        Only flags are set here: the thread that a signal interrupts may hold any lock.
        """
        if self._service.stopping:
            self.should_exit = self.force_exit = True
        self._service.stopping = True


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that is bound to an address and accepts no connections yet.

    Raises:
        UserError: the address cannot be listener.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Connections inherit the protocol. asyncio sets TCP_NODELAY only if the protocol is TCP; without it a reply's body
    # would wait 40 ms for the client to acknowledge the headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): give another --host or --port"
        ) from error
    return listener


def serve(
    service: WorkerService, listener: socket.socket, on_listening: Callable[[int], None] = lambda port: None
) -> None:
    """Serve until a signal or an engine failure, then close the worker, unless requests were given up.

    Args:
        listener: socket from ``listen``.
        on_listening: called with the port once requests are accepted.

    Raises:
        EngineFaultError: the engines failed. A process manager should start the server again.
    """
    server = ImageServer(service, on_listening)
    server.run(sockets=[listener])
    if service.fault is not None:
        # The worker is not closed: that would wait for a thread that may never return.
        raise EngineFaultError(f"the server ended because its engine failed: {service.fault}")
    if not service.gave_up:  # closing would wait for the engine call that is still running
        service.worker.close()
