"""Full queues, deadlines, clients that disconnect, engines that fail or hang, and the shutdown of a server."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest

from offcut.errors import EngineFaultError, QueueFullError
from offcut.runtime.batching.statistics import Statistics, Total
from offcut.runtime.server.http import problem_of, retry_after
from offcut.runtime.server.run import listen
from offcut.runtime.server.settings import ServeSettings

LONG = {"prompt": "a", "num_inference_steps": 40, "interval": 4, "seed": 1}
QUICK = ServeSettings(steps=6, interval=3, warmup=0, linger=1.0)

WaitUntil = Callable[..., None]


@pytest.fixture
def clients() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


def test_a_full_queue_replies_with_retry_after(
    start_server: Any, gate: Any, clients: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    with start_server(QUICK, max_in_flight=1, max_queue=1) as server:
        gate.close()
        worker = server.service.worker
        first = clients.submit(server.post, {"prompt": "a", "seed": 1})
        assert gate.reached.wait(60)
        second = clients.submit(server.post, {"prompt": "a", "seed": 2})
        wait_until(lambda: worker.statistics().queued == 1)
        refused = server.post({"prompt": "a"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 600
        gate.open.set()
        assert [one.result().status_code for one in (first, second)] == [200, 200]
        assert 'offcut_rejections_total{reason="queue_full"} 1.0' in server.get("/metrics").text


def test_connections_have_tcp_nodelay() -> None:
    """Otherwise Nagle's algorithm delays every reply of a connection, except for the first, by 40 ms."""

    async def nodelay_of_a_connection() -> int:
        option: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            option.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        address = listen("127.0.0.1", 0)
        async with await asyncio.start_server(on_connection, sock=address):
            _, writer = await asyncio.open_connection(*address.getsockname())
            writer.close()
            return await option

    assert asyncio.run(nodelay_of_a_connection())


def test_retry_after_grows_with_the_load() -> None:
    busy = Statistics(
        queued=30, in_flight=4, queue_waits=Total(100, 300.0), requests={"done": Total(100, 1100.0)}
    )  # 8 s each, 4 at once
    assert retry_after(busy) == math.ceil(8.0 * 15 / 4)
    assert retry_after(Statistics()) == 5
    assert retry_after(replace(busy, queued=0)) == 1
    assert retry_after(replace(busy, queued=10**6)) == 600
    assert problem_of(QueueFullError("full"), busy).retry_after == 30


def test_a_client_may_shorten_the_deadline_but_not_lengthen_it(
    start_server: Any, gate: Any, clients: ThreadPoolExecutor
) -> None:
    with start_server(replace(QUICK, timeout=2.0)) as server:
        gate.close()
        short = clients.submit(server.post, {"prompt": "a", "timeout": 0.2})
        long = clients.submit(server.post, {"prompt": "a", "timeout": 500})
        assert gate.reached.wait(60)
        time.sleep(2.2)
        gate.open.set()
        for late in (short, long):
            assert late.result().status_code == 504
            assert late.result().json()["error"]["code"] == "deadline_exceeded"
        assert server.service.worker.statistics().requests["expired"].count == 2
        assert server.post({"prompt": "a", "timeout": 500}).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_place_within_a_step(
    stream: bool, start_server: Any, gate: Any, clients: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    with start_server(QUICK) as server:
        worker = server.service.worker
        with httpx.Client() as client:
            request = client.build_request(
                "POST", f"{server.url}/v1/images/generations", json={**LONG, "stream": stream}, timeout=60
            )
            if stream:
                reply = client.send(request, stream=True)
                lines = reply.iter_lines()
                assert next(lines) == "event: image_generation.progress"
                gate.close()
                assert gate.reached.wait(60)
                reply.close()
            else:
                gate.close()
                request.extensions["timeout"] = {"connect": 60, "write": 60, "pool": 60, "read": 2}
                with pytest.raises(httpx.ReadTimeout):
                    client.send(request)
                assert gate.reached.wait(60)
        wait_until(lambda: not server.service.open_jobs)  # the server has noticed
        assert worker.statistics().in_flight == 1  # in an engine call
        calls = gate.calls
        gate.open.set()
        wait_until(lambda: worker.statistics().in_flight == 0)
        assert gate.calls <= calls + 1
        assert worker.statistics().slots == 0
        assert worker.statistics().requests["cancelled"].count == 1
        assert 'offcut_request_seconds_count{outcome="cancelled"} 1.0' in server.get("/metrics").text
        assert server.post({"prompt": "a"}).status_code == 200


def test_draining_finishes_the_requests_in_flight(
    start_server: Any, gate: Any, clients: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    with start_server(QUICK, max_in_flight=1) as server:
        gate.close()
        tickets = [clients.submit(server.post, {"prompt": "a", "seed": seed}) for seed in range(2)]
        stream = clients.submit(server.post, {"prompt": "a", "stream": True})
        wait_until(lambda: server.service.worker.statistics().queued == 2)
        assert gate.reached.wait(60)
        server.service.stopping = True
        assert server.get("/v2/health/ready").status_code == 503
        assert server.get("/v2/health/live").json() == {"live": True}
        refused = server.post({"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
        assert int(refused.headers["retry-after"]) > 0
        gate.open.set()
        assert [ticket.result().status_code for ticket in tickets] == [200, 200]
        assert stream.result().text.endswith("data: [DONE]\n\n")
        server.thread.join(60)
        assert not server.thread.is_alive()
        assert server.errors == []
        with pytest.raises(httpx.ConnectError):
            server.get("/v2/health/live")


def test_a_drain_that_takes_too_long_ends_each_request_with_an_error(
    start_server: Any, gate: Any, clients: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    with start_server(replace(QUICK, drain=0.3)) as server:
        gate.close()
        waiting = [clients.submit(server.post, {"prompt": "a", "stream": stream}) for stream in (False, True)]
        wait_until(lambda: server.service.worker.statistics().in_flight == 2)
        assert gate.reached.wait(60)
        server.service.stopping = True
        whole, stream = (one.result() for one in waiting)
        assert (whole.status_code, whole.json()["error"]["code"]) == (503, "draining")
        assert stream.text.startswith("event: error\n")
        assert '"code": "draining"' in stream.text
        gate.open.set()
        server.thread.join(60)
        assert server.errors == []


def test_an_engine_that_fails_ends_the_server(
    start_server: Any, gate: Any, clients: ThreadPoolExecutor, wait_until: WaitUntil
) -> None:
    with start_server(replace(QUICK, linger=3.0)) as server:
        assert server.get("/v2/health/ready").json() == {"ready": True}
        gate.close()
        whole = clients.submit(server.post, LONG)
        stream = clients.submit(server.post, {**LONG, "stream": True})
        wait_until(lambda: server.service.worker.statistics().in_flight == 2)
        assert gate.reached.wait(60)
        gate.error = RuntimeError("cannot read /secret/engine.plan")
        gate.open.set()
        assert (whole.result().status_code, whole.result().json()["error"]["code"]) == (503, "engine_fault")
        lines = stream.result().text.split("\n\n")
        assert lines[-2].startswith("event: error\n")
        assert json.loads(lines[-2].partition("data: ")[2])["error"]["code"] == "engine_fault"
        wait_until(lambda: server.get("/v2/health/ready").status_code == 503, 2)
        assert server.get("/v2/health/live").status_code == 503
        refused = server.post({"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_fault")
        assert "offcut_healthy 0.0" in server.get("/metrics").text
        for text in (whole.result().text, stream.result().text, refused.text):
            assert "secret" not in text
        server.thread.join(60)
        (error,) = server.errors
        assert isinstance(error, EngineFaultError)
        assert "/secret/engine.plan" in str(error)  # for the log


def test_an_engine_that_hangs_ends_the_server(start_server: Any, gate: Any, clients: ThreadPoolExecutor) -> None:
    with start_server(replace(QUICK, stall=0.5, linger=3.0)) as server:
        gate.close()
        waiting = clients.submit(server.post, LONG)
        assert (waiting.result().status_code, waiting.result().json()["error"]["code"]) == (503, "engine_fault")
        assert server.get("/v2/health/ready").status_code == 503
        server.thread.join(60)
        assert "no progress for 0.5 s" in str(server.errors[0])
        gate.open.set()


def test_an_engine_thread_that_has_ended_ends_the_server(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(replace(QUICK, linger=3.0)) as server:
        assert server.service.worker.healthy
        thread = threading.Thread(target=lambda: None)
        thread.start()
        thread.join()
        monkeypatch.setattr(server.service.worker._batcher, "_thread", thread)
        assert server.get("/v2/health/ready").status_code == 503
        server.thread.join(60)
        assert "has ended" in str(server.errors[0])
        monkeypatch.undo()


def test_a_bug_in_the_server_shows_no_details(start_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with start_server(QUICK) as server:

        def fail(body: object) -> None:
            raise KeyError("/home/somebody/secret")

        monkeypatch.setattr(server.service, "submit", fail)
        reply = server.post({"prompt": "a"})
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in reply.text
        monkeypatch.undo()
        monkeypatch.setattr(server.service.metrics, "text", fail, raising=True)
        reply = server.get("/metrics")
        assert (reply.status_code, reply.json()["error"]["code"]) == (500, "internal_error")
        monkeypatch.undo()
        assert server.post({"prompt": "a"}).status_code == 200
