"""Attack: connections that hold the server's memory or its places without a request, on a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from offcut.runtime.server.connections import ConnectionLimits, protocol_class
from offcut.runtime.server.http import Problem

BODY_BYTES = 1000
LIMITS = ConnectionLimits(
    connections=8, per_address=8, head_bytes=4096, head_seconds=0.5, idle_seconds=5, stall_seconds=0.5
)


class Server:
    """A server whose application waits at ``/slow`` and sends 64 MiB at ``/large``."""

    def __init__(self, limits: ConnectionLimits) -> None:
        self.problems: list[Problem] = []
        self.release = threading.Event()
        config = uvicorn.Config(
            self.app,
            http=protocol_class(limits, BODY_BYTES, self.problems.append),  # type: ignore[arg-type]
            log_level="error",
            lifespan="off",
            interface="asgi3",
            ws="none",
            timeout_keep_alive=int(limits.idle_seconds),
        )
        self.uvicorn = uvicorn.Server(config)
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.address = self.listener.getsockname()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        while scope["path"] == "/slow" and not self.release.is_set():
            await asyncio.sleep(0.01)
        body = b"x" * 2**26 if scope["path"] == "/large" else b"ok"
        headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def connect(self) -> socket.socket:
        client = socket.create_connection(self.address, timeout=5)
        client.settimeout(5)
        return client

    @property
    def open_connections(self) -> int:
        return len(self.uvicorn.server_state.connections)


@contextmanager
def running(limits: ConnectionLimits) -> Iterator[Server]:
    server = Server(limits)
    thread = threading.Thread(target=server.uvicorn.run, kwargs={"sockets": [server.listener]})
    thread.start()
    try:
        while not server.uvicorn.started:
            time.sleep(0.01)
        yield server
    finally:
        server.release.set()
        server.uvicorn.should_exit = True
        server.uvicorn.force_exit = True
        thread.join(10)
        assert not thread.is_alive()


@pytest.fixture
def server() -> Iterator[Server]:
    with running(LIMITS) as server:
        yield server


def reply_of(client: socket.socket) -> tuple[int, Any]:
    """Return status and body of a reply after which the connection is closed."""
    received = b""
    while chunk := client.recv(65536):
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    text = body.decode()
    return int(head.split()[1]), json.loads(text) if b"application/json" in head else text


def get(server: Server, path: str = "/") -> tuple[int, Any]:
    with server.connect() as client:
        client.sendall(f"GET {path} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n".encode())
        return reply_of(client)


FILLER = b"x-filler: " + b"y" * 8000 + b"\r\n"


def send_until_cut(client: socket.socket, line: bytes, *, most: int, pause: float = 0) -> None:
    """Send a header again and again, at most so often, until the server closes the connection."""
    for _ in range(most):
        try:
            client.sendall(line)
        except (ConnectionResetError, BrokenPipeError):
            return
        time.sleep(pause)
    raise AssertionError("the server reads on")


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_idle_connections_do_not_shut_others_out(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(5 * LIMITS.connections):
            stack.enter_context(server.connect())
        assert get(server) == (200, "ok")
        assert server.open_connections <= LIMITS.connections


def test_a_connection_without_a_request_is_closed_in_time(server: Server) -> None:
    with server.connect() as client:
        status, body = reply_of(client)
    assert (status, body["error"]["code"]) == (408, "head_too_slow")
    assert [problem.code for problem in server.problems] == ["head_too_slow"]


@pytest.mark.parametrize("first", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"], ids=["first", "later"])
def test_a_head_that_arrives_a_line_at_a_time_is_cut(first: bytes, server: Server) -> None:
    with server.connect() as client:
        if first:
            client.sendall(first)
            assert client.recv(65536).endswith(b"ok")
        client.sendall(b"GET / HTTP/1.1\r\n")
        started = time.monotonic()
        send_until_cut(client, b"x-filler: 1\r\n", most=1000, pause=0.05)
        assert time.monotonic() - started < 5
    assert server.problems[0].code == "head_too_slow"


def test_a_head_without_an_end_is_refused_before_it_fills_the_memory(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\n")
        send_until_cut(client, FILLER, most=2000)
    assert server.problems[0].code == "head_too_large"


def test_a_large_head_is_refused_in_the_form_of_the_api(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"GET / HTTP/1.1\r\nhost: a\r\nx-filler: " + b"y" * 5000)
        status, body = reply_of(client)
    assert (status, body["error"]["code"]) == (431, "head_too_large")
    assert get(server) == (200, "ok")


def test_trailers_without_an_end_close_the_connection(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"POST /slow HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n")
        send_until_cut(client, FILLER, most=2000)


def test_what_is_not_http_is_refused_in_the_form_of_the_api(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03 not http\r\n\r\n")
        status, body = reply_of(client)
    assert (status, body["error"]["code"]) == (400, "invalid_request")


def test_busy_connections_leave_room_for_health_checks_only(server: Server) -> None:
    with contextlib.ExitStack() as stack:
        for _ in range(LIMITS.connections):
            client = stack.enter_context(server.connect())
            client.sendall(b"GET /slow HTTP/1.1\r\nhost: a\r\n\r\n")
        wait_until(lambda: server.open_connections == LIMITS.connections)
        time.sleep(0.2)  # until the requests are read
        status, body = get(server)
        assert (status, body["error"]["code"]) == (503, "too_many_connections")
        assert get(server, "/v2/health/live") == (200, "ok")
        server.release.set()
        wait_until(lambda: get(server) == (200, "ok"))


def test_a_client_that_stops_reading_is_cut(server: Server) -> None:
    with server.connect() as client:
        client.sendall(b"GET /large HTTP/1.1\r\nhost: a\r\n\r\n")
        wait_until(lambda: server.open_connections == 1)
        wait_until(lambda: server.open_connections == 0)


def test_one_address_cannot_take_the_places_of_others() -> None:
    limits = ConnectionLimits(connections=8, per_address=2, head_seconds=5)
    with running(limits) as server, contextlib.ExitStack() as stack:
        for _ in range(6):
            stack.enter_context(server.connect())
        wait_until(lambda: server.open_connections == 2)
        assert get(server) == (200, "ok")


def test_limits_fit_the_files_that_the_process_may_open(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    changes = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (256, 600))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: changes.append(limits))
    limits = ConnectionLimits.for_process()
    assert changes == [(600, 600)]
    assert (limits.connections, limits.per_address) == (300, 150)
