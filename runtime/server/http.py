"""Error replies in OpenAI's format, and the checks that every request passes before the routes."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...errors import (
    CapacityError,
    CutError,
    DeadlineError,
    EngineFaultError,
    LimitError,
    QueueFullError,
    ReplicaLostError,
    RequestCancelledError,
    ScheduleError,
    ShapeError,
    WorkerClosedError,
)
from ..batching import Statistics
from .settings import ServeSettings

INVALID, BUSY, SERVER = "invalid_request_error", "rate_limit_error", "server_error"
"""OpenAI's error types."""


@dataclass(frozen=True)
class Problem:
    """An error as the client sees it: one sentence without traceback or path.

    Attributes:
        status: HTTP status.
        message: one sentence.
        type, code, param: as in OpenAI's API; the code is also the label of the metric.
        retry_after: seconds after which another try may succeed; None if it would not.
        close: whether to close the connection, because the request was not read to its end.
        challenge: whether the reply asks for a key (``WWW-Authenticate``).
    """

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    retry_after: int | None = None
    close: bool = False
    challenge: bool = False

    def body(self) -> dict[str, Any]:
        """Return OpenAI's error object."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the reply."""
        headers = {
            **({"retry-after": str(self.retry_after)} if self.retry_after is not None else {}),
            **({"connection": "close"} if self.close else {}),
            **({"www-authenticate": "Bearer"} if self.challenge else {}),
        }
        return json_response(self.body(), self.status, headers)


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON reply in ASCII: text from a client may hold half a surrogate pair, which UTF-8 cannot encode."""
    return Response(json.dumps(value), status, headers, "application/json")


def size_text(size: tuple[int, int]) -> str:
    """Return width and height as ``WIDTHxHEIGHT``."""
    return f"{size[0]}x{size[1]}"


_REQUEST_ERRORS: dict[type[Exception], tuple[int, str, str]] = {
    LimitError: (422, INVALID, "limit_exceeded"),
    CapacityError: (422, INVALID, "limit_exceeded"),
    ShapeError: (422, INVALID, "unsupported_size"),
    ScheduleError: (422, INVALID, "invalid_schedule"),
    CutError: (422, INVALID, "unknown_cut"),
    QueueFullError: (429, BUSY, "queue_full"),
    DeadlineError: (504, SERVER, "deadline_exceeded"),
    RequestCancelledError: (503, SERVER, "cancelled"),
}
"""Status, type and code of the errors whose message the client may read."""

CODES = (
    *dict.fromkeys(code for _, _, code in _REQUEST_ERRORS.values()),
    "draining",
    "engine_fault",
    "replica_lost",
    "internal_error",
    "invalid_request",
    "invalid_json",
    "body_too_large",
    "body_too_slow",
    "head_too_large",
    "head_too_slow",
    "too_many_connections",
    "invalid_api_key",
    "cross_site",
    "unknown_host",
    "unsupported_media_type",
    "model_not_found",
    "not_found",
    "method_not_allowed",
)
"""Every error code of a reply."""

DRAINING = Problem(
    503, "this server is shutting down: send the request to another one", SERVER, "draining", retry_after=5
)
FAULT = Problem(503, "the engine failed, and the server restarts: try again", SERVER, "engine_fault", retry_after=10)
LOST = Problem(
    503,
    "the replicas that worked on this request were lost: send it again with the same seed",
    SERVER,
    "replica_lost",
    retry_after=5,
)
INTERNAL = Problem(500, "the server failed on this request; its log has the reason", SERVER, "internal_error")


def problem_of(error: BaseException, statistics: Statistics) -> Problem:
    """Return the problem that the client gets for an error. Messages that may contain paths stay in the log.

    Args:
        statistics: load of the server, from which ``retry_after`` is computed.
    """
    if isinstance(error, EngineFaultError):
        return FAULT
    if isinstance(error, WorkerClosedError):
        return DRAINING
    if isinstance(error, ReplicaLostError):
        return LOST
    for kind, (status, error_type, code) in _REQUEST_ERRORS.items():
        if isinstance(error, kind):
            seconds = retry_after(statistics) if status == 429 else None
            param = error.field if isinstance(error, LimitError) else None
            return Problem(status, str(error), error_type, code, param, seconds)
    return INTERNAL


def invalid_body(errors: Sequence[Mapping[str, Any]]) -> Problem:
    """Return the problem for a body that pydantic refused.

    Args:
        errors: pydantic's errors. Only the first is reported. The message repeats the name of a field, never a value.
    """
    first = errors[0]
    path = [str(part)[:64] for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return Problem(400, "the body is not valid JSON", INVALID, "invalid_json")
    message = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = "there is no such field: leave it out"
    if first["type"] in ("model_attributes_type", "model_type", "missing") and not path:
        message = "the body must be a JSON object"
    name = ".".join(path) or None
    return Problem(422, f"{name}: {message}" if name else message, INVALID, "invalid_request", name)


def retry_after(statistics: Statistics) -> int:
    """Return the seconds, from 1 to 600, until half of the queued requests should have started."""
    done = statistics.requests.get("done")
    if done is None or not done.count:
        return 5
    run_seconds = max(done.mean - statistics.queue_waits.mean, 0.0)  # of one request, without its time in the queue
    in_flight = max(statistics.in_flight, 1)
    return min(max(math.ceil(run_seconds * statistics.queued / 2 / in_flight), 1), 600)


PUBLIC_PATHS = frozenset({"/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready"})
"""Paths that need no key: the health checks, and the page, which has a field for the key."""

_CONTENT_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SECURITY_HEADERS = [
    (b"content-security-policy", _CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
]

_READ_METHODS = ("GET", "HEAD")


class _Disconnected(Exception):
    """The client disconnected before its whole body had arrived."""


class RequestGuard:
    """ASGI middleware that checks host, key, origin, content type and body size before the application runs.

    The guard reads a body up to the limit and passes it on whole, so a body that is too large or too slow never
    reaches the application. Only JSON bodies pass: a web page of another origin can send other content types without
    a preflight. No reply allows other origins to read it.

    Args:
        app: the application.
        settings: API key, hosts and limits.
        on_refusal: called with the problem of each refused request.
    """

    def __init__(self, app: ASGIApp, settings: ServeSettings, on_refusal: Callable[[Problem], None]) -> None:
        self._app, self._on_refusal = app, on_refusal
        self._limits, self._hosts = settings.limits, settings.hosts
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(header for header in _SECURITY_HEADERS if header[0] not in present),
                ]
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        has_body = scope["method"] not in _READ_METHODS
        problem = self._check_host_and_key(scope, headers)
        if problem is None and has_body:
            problem = _check_content(headers)
            if problem is None:
                try:
                    body = await self._read_body(headers, receive)
                except _Disconnected:
                    return
                if isinstance(body, Problem):
                    problem = body
                else:
                    receive = _replay(body, receive)
        if problem is not None:
            self._on_refusal(problem)
            await replace(problem, close=has_body).response()(scope, receive, send_with_headers)
            return
        await self._app(scope, receive, send_with_headers)

    def _check_host_and_key(self, scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
        if self._hosts is not None and _host_name(headers.get(b"host", b"")) not in self._hosts:
            return Problem(
                421,
                "this host name is not allowed: start the server with --allow-host NAME",
                INVALID,
                "unknown_host",
            )
        if self._key is None or (scope["path"] in PUBLIC_PATHS and scope["method"] in _READ_METHODS):
            return None
        scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(key.strip(), self._key):
            return None
        return Problem(
            401,
            "the API key is missing or wrong: send it as a bearer token",
            INVALID,
            "invalid_api_key",
            challenge=True,
        )

    async def _read_body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | Problem:
        """Return the body, or a problem if it is too large or too slow."""
        limit, seconds = self._limits.body_bytes, self._limits.body_seconds
        too_large = Problem(
            422, f"the body is larger than the {limit} bytes that this server reads", INVALID, "body_too_large"
        )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            return too_large
        chunks: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Disconnected
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    more = message.get("more_body", False)
                    if size > limit:
                        return too_large
        except TimeoutError:
            return Problem(408, f"the body did not arrive within {seconds:g} s", SERVER, "body_too_slow")
        return b"".join(chunks)


def _check_content(headers: dict[bytes, bytes]) -> Problem | None:
    if headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
        return Problem(403, "this server refuses requests from pages of other sites", INVALID, "cross_site")
    content_type = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
    if content_type != b"application/json":
        return Problem(415, "the body must have the content type application/json", INVALID, "unsupported_media_type")
    return None


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a ``receive`` that gives the body in one piece, and then the server's messages (a disconnect)."""
    replayed = False

    async def receive_again() -> Message:
        nonlocal replayed
        if not replayed:
            replayed = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return receive_again


def _host_name(host: bytes) -> str:
    """Return the host name of a ``Host`` header, without port and brackets; empty if the header is not valid.

    ``[::1]:8000`` gives ``::1``, and ``[::1].example.com`` an empty name.
    """
    text = host.decode("latin-1").strip().lower()
    address, bracket, rest = text.removeprefix("[").partition("]") if text.startswith("[") else ("", "", text)
    name, colon, port = rest.rpartition(":") if ":" in rest else (rest, "", "")
    if (colon and not port.isdigit()) or (bracket and name):
        return ""  # not a valid host
    return address or name
