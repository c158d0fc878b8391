"""Connections of the server: how many may be open, and how long and how large the head of a request may be.

These limits hold before a request has a key. uvicorn itself has none of them: connections that never send a request,
heads that arrive a byte at a time, and heads without an end would each use up the server.
"""

from __future__ import annotations

import asyncio
import http
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from .http import BUSY, INVALID, PUBLIC_PATHS, SERVER, Problem

log = logging.getLogger("offcut.server")

_FILES_PER_CONNECTION = 2
"""Open files that a connection may need: its socket, and one more for the rest of the process."""

_LOG_SECONDS = 60.0
"""Time between two messages about too many connections."""


@dataclass(frozen=True)
class ConnectionLimits:
    """Limits of the server's connections.

    Attributes:
        connections: connections at a time. Near this number the oldest connection without a request is closed.
        per_address: connections from one address at a time, likewise.
        head_bytes: size of a request's head: its first line and its headers.
        head_seconds: time from the start of a connection, or from the first byte of a later request, until the whole
            head has arrived.
        idle_seconds: time for which a connection may stay open between two requests.
        stall_seconds: time for which a client may read nothing of a reply that waits for it.
    """

    connections: int = 1024
    per_address: int = 512
    head_bytes: int = 2**16
    head_seconds: float = 10.0
    idle_seconds: float = 30.0
    stall_seconds: float = 60.0

    @classmethod
    def for_process(cls) -> ConnectionLimits:
        """Return the default limits, or smaller ones where this process may open few files.

        The soft limit of open files is raised first, as far as the system allows without privileges.
        """
        if sys.platform == "win32":
            return cls()
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = _FILES_PER_CONNECTION * cls.connections
        if soft < needed:
            soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        connections = min(cls.connections, soft // _FILES_PER_CONNECTION)
        return cls(connections, per_address=max(connections // 2, 1))


_TOO_MANY = Problem(503, "the server has too many connections: try again", BUSY, "too_many_connections", retry_after=5)


class _Overview:
    """Connections of one server, oldest first."""

    def __init__(self, limits: ConnectionLimits, on_refusal: Callable[[Problem], None]) -> None:
        self.limits, self.on_refusal = limits, on_refusal
        self._connections: dict[Any, None] = {}
        self._last_message = -_LOG_SECONDS

    def admit(self, new: Any) -> bool:
        """Add a connection, and close another one that has no request if there are too many.

        Returns:
            False if there are too many connections with a request.
        """
        self._connections[new] = None
        same_address = [each for each in self._connections if each.address == new.address]
        fits = self._make_room(same_address, self.limits.per_address, new)
        return self._make_room(list(self._connections), self.limits.connections, new) and fits

    def remove(self, connection: Any) -> None:
        self._connections.pop(connection, None)

    def _make_room(self, connections: list[Any], limit: int, new: Any) -> bool:
        if len(connections) <= limit:
            return True
        now = time.monotonic()
        if now - self._last_message > _LOG_SECONDS:
            self._last_message = now
            log.warning("more than %d connections: those without a request are closed, others are refused", limit)
        idle = next((each for each in connections if each is not new and each.is_idle), None)
        if idle is None:
            return False
        self.remove(idle)
        idle.transport.abort()
        return True


def protocol_class(
    limits: ConnectionLimits, body_bytes: int, on_refusal: Callable[[Problem], None]
) -> type[asyncio.Protocol]:
    """Return a class for uvicorn's ``http`` setting whose connections keep to these limits.

    Args:
        body_bytes: size of a request body that the application reads. More than eight times as much on one request
            (chunks, trailers) closes the connection.
        on_refusal: called with the problem of each refused request.
    """
    overview = _Overview(limits, on_refusal)
    too_large = Problem(
        431, f"the head of the request has more than {limits.head_bytes} bytes", INVALID, "head_too_large"
    )
    too_slow = Problem(
        408, f"the head of the request did not arrive within {limits.head_seconds:g} s", SERVER, "head_too_slow"
    )
    body_too_large = Problem(422, "the request is larger than this server reads", INVALID, "body_too_large")

    class LimitedProtocol(AutoHTTPProtocol):  # type: ignore[misc, valid-type]  # httptools' or h11's
        """uvicorn's protocol of one connection, within limits."""

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.address = self.client[0] if self.client else ""
            self._received = 0
            self._stall: asyncio.TimerHandle | None = None
            self._deadline: asyncio.TimerHandle | None = self._after(limits.head_seconds, too_slow)
            if not overview.admit(self):
                app: ASGIApp = self.app
                self.app: ASGIApp = _without_room(app, on_refusal)

        @property
        def is_idle(self) -> bool:
            """Whether no request is answered on this connection."""
            return self.cycle is None or self.cycle.response_complete

        def data_received(self, data: bytes) -> None:
            in_head, cycle = self.is_idle, self.cycle
            if in_head and self._deadline is None:
                self._deadline = self._after(limits.head_seconds, too_slow)
            self._received += len(data)
            super().data_received(data)
            if self.cycle is not cycle:  # a head is complete
                self._stop_deadline()
                self._received = 0
                size = sum(len(name) + len(value) for name, value in self.scope["headers"])
                if size > limits.head_bytes:
                    self.refuse(too_large)
            elif self._received > (limits.head_bytes if in_head else limits.head_bytes + 8 * body_bytes):
                self.refuse(too_large if in_head else body_too_large)

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stall = self.loop.call_later(limits.stall_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stall is not None:
                self._stall.cancel()
                self._stall = None

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_deadline()
            if self._stall is not None:
                self._stall.cancel()
            overview.remove(self)
            super().connection_lost(exc)

        def send_400_response(self, msg: str) -> None:
            """Reply to what is not HTTP in the form of the API."""
            self.refuse(Problem(400, "this is not a valid HTTP request", INVALID, "invalid_request"))

        def refuse(self, problem: Problem) -> None:
            """Reply with a problem and close the connection."""
            if self.transport.is_closing():
                return
            self._stop_deadline()
            on_refusal(problem)
            if self.is_idle:
                self.transport.write(_reply(problem))
                self.transport.close()
            else:  # the application may be writing a reply
                self.transport.abort()

        def _after(self, seconds: float, problem: Problem) -> asyncio.TimerHandle:
            timer: asyncio.TimerHandle = self.loop.call_later(seconds, self.refuse, problem)
            return timer

        def _stop_deadline(self) -> None:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return LimitedProtocol


def _reply(problem: Problem) -> bytes:
    """Return a problem as an HTTP reply after which the connection is closed."""
    body = json.dumps(problem.body()).encode()
    head = (
        f"HTTP/1.1 {problem.status} {http.HTTPStatus(problem.status).phrase}\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


def _without_room(app: ASGIApp, on_refusal: Callable[[Problem], None]) -> ASGIApp:
    """Return an application that answers health checks as ``app`` does, and refuses everything else."""

    async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] in PUBLIC_PATHS and scope["path"].startswith("/v2/health/"):
            await app(scope, receive, send)
            return
        on_refusal(_TOO_MANY)
        await replace(_TOO_MANY, close=True).response()(scope, receive, send)

    return refuse
