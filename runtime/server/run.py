"""A server from its start to its end: uvicorn, signals, and what becomes of a fault."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from ...errors import EngineFaultError, UserError
from .app import create_app
from .offer import log
from .service import Service

_SENDING = 10
"""Seconds that clients have to read what was sent to them, once everything is drawn."""


_CONNECTIONS = 1024
"""At once; more than the worker's queue has places, and fewer than a process has files."""


class Server(uvicorn.Server):
    """uvicorn around a service: a signal stops new requests first, and the process once the others are done.

    Args:
        service: what it serves.
        on_listening: called with the port once requests are taken.
    """

    def __init__(self, service: Service, on_listening: Callable[[int], None] = lambda port: None) -> None:
        config = uvicorn.Config(
            create_app(service),
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="off",
            ws="none",
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=_SENDING,
        )
        super().__init__(config)
        self._service, self._on_listening = service, on_listening
        self._watching: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._watching = asyncio.create_task(self._watch())
        self._on_listening(self.servers[0].sockets[0].getsockname()[1])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        if self._watching is not None:
            self._watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watching
        await super().shutdown(sockets)

    async def _watch(self) -> None:
        try:
            await self._service.watch(self._leave)
        except Exception:
            log.exception("the watch over the worker failed, so the server ends")
            self._service.stopping = True
            self._leave()
            raise

    def _leave(self) -> None:
        self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests finish, a second one does not.

        Only flags are set here: the thread that a signal interrupts may hold any lock.
        """
        if self._service.stopping:
            self.should_exit = self.force_exit = True
        self._service.stopping = True


def listen(host: str, port: int) -> socket.socket:
    """A socket with this address, which takes no connections yet.

    Raises:
        UserError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Connections inherit the protocol, and asyncio sends at once only on those that name TCP: a reply's body would wait
    # 40 ms for the client to acknowledge its headers.
    made = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((host, port))
    except OSError as error:
        made.close()
        raise UserError(
            f"cannot listen on {host} port {port} ({error.strerror or error}): give another --host or --port"
        ) from error
    return made


def serve(service: Service, address: socket.socket, on_listening: Callable[[int], None] = lambda port: None) -> None:
    """Serve until a signal, or until the engines fail. The worker is closed at the end.

    Raises:
        EngineFaultError: the engines failed; whoever started the process starts it again.
    """
    server = Server(service, on_listening)
    server.run(sockets=[address])
    if service.fault is not None:
        # Closing would wait for a thread that may never come back.
        raise EngineFaultError(f"the server ended because its engine failed: {service.fault}")
    service.worker.close()
