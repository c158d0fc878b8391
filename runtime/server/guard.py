"""What every request passes before the application sees it: host, key, origin, kind and size of the body."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Iterable
from dataclasses import replace

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .problems import INVALID, SERVER, Problem
from .settings import LOOPBACK, Limits, Settings

OPEN = frozenset({"/", "/page.js", "/page.css", "/v2/health/live", "/v2/health/ready"})
"""What needs no key: health, and the page, which asks its reader for one."""

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]

_READS = ("GET", "HEAD")


class _Gone(Exception):
    """The client went away before its body had arrived."""


class Guard:
    """ASGI middleware around the whole application.

    A body is read here, up to the limit, and handed on whole: one that is too large or too slow never reaches the
    application. Bodies are JSON and nothing else, since a web page of another origin can send other kinds without
    asking; no reply allows other origins to read it.

    Args:
        app: the application.
        settings: key, hosts and limits.
        refused: is told of each refusal.
    """

    def __init__(self, app: ASGIApp, settings: Settings, refused: Callable[[Problem], None]) -> None:
        self._app, self._refused = app, refused
        self._limits: Limits = settings.limits
        self._hosts = settings.hosts
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent = {name.lower() for name, _ in message["headers"]}
                extra = [*HEADERS, (b"cache-control", b"no-store")]
                message["headers"] = [*message["headers"], *(pair for pair in extra if pair[0] not in sent)]
            await send(message)

        headers = {name.lower(): value for name, value in scope["headers"]}
        problem = self._stranger(scope, headers)
        if problem is None and scope["method"] not in _READS:
            problem = self._wrong_kind(headers)
            if problem is None:
                try:
                    body = await self._read(headers, receive)
                except _Gone:
                    return
                if isinstance(body, Problem):
                    problem = body
                else:
                    receive = _replay(body, receive)
        if problem is not None:
            self._refused(problem)
            unread = scope["method"] not in _READS
            await replace(problem, close=unread).response()(scope, receive, answer)
            return
        await self._app(scope, receive, answer)

    def _stranger(self, scope: Scope, headers: dict[bytes, bytes]) -> Problem | None:
        if self._hosts is not None and _name(headers.get(b"host", b"")) not in self._hosts:
            return Problem(
                421,
                "this server does not answer to that host name: start it with --allow-host",
                INVALID,
                "unknown_host",
            )
        if self._key is None or (scope["path"] in OPEN and scope["method"] in _READS):
            return None
        scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
        if scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key):
            return None
        return Problem(
            401,
            "the API key is missing or wrong: send it as a bearer token",
            INVALID,
            "invalid_api_key",
            challenge=True,
        )

    def _wrong_kind(self, headers: dict[bytes, bytes]) -> Problem | None:
        if headers.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            return Problem(403, "requests from another site's page are not taken", INVALID, "cross_site")
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            return Problem(
                415, "the body must have the content type application/json", INVALID, "unsupported_media_type"
            )
        return None

    async def _read(self, headers: dict[bytes, bytes], receive: Receive) -> bytes | Problem:
        """The body, or why it is not read to its end."""
        limit, seconds = self._limits.body_bytes, self._limits.body_seconds
        too_large = Problem(
            422, f"the body is larger than the {limit} bytes that this server reads", INVALID, "body_too_large"
        )
        declared = headers.get(b"content-length", b"0")
        if declared.isdigit() and int(declared[:20]) > limit:
            return too_large
        parts: list[bytes] = []
        size, more = 0, True
        try:
            async with asyncio.timeout(seconds):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    more = message.get("more_body", False)
                    if size > limit:
                        return too_large
        except TimeoutError:
            return Problem(408, f"the body did not arrive within {seconds:g} s", SERVER, "body_too_slow")
        return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body in one piece, and then what the server says, which is that the client went away."""
    waiting = True

    async def again() -> Message:
        nonlocal waiting
        if waiting:
            waiting = False
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return again


def _name(host: bytes) -> str:
    """``[::1]:8000`` without port and brackets."""
    text = host.decode("latin-1").strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.rpartition(":")[0] if ":" in text else text


def hosts_for(address: str, allowed: Iterable[str]) -> tuple[str, ...] | None:
    """The names by which a server at this address may be called: its own if only this machine reaches it, else any."""
    if address in LOOPBACK:
        return (*LOOPBACK, *(name.lower() for name in allowed))
    named = tuple(name.lower() for name in allowed)
    return named or None
