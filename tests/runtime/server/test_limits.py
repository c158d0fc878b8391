"""What asks for too much, or is no request at all, is refused before any work; strangers are not let in."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import offcut
from offcut.errors import UserError
from offcut.runtime.server.service import WorkerService
from offcut.runtime.server.settings import RequestLimits, ServeSettings, allowed_hosts

ROOT = Path(offcut.__file__).parent
SMALL = ServeSettings(
    steps=2,
    interval=3,
    warmup=0,
    limits=RequestLimits(
        prompt_chars=20,
        steps=8,
        images=2,
        pixels=64 * 64,
        pixel_steps=64 * 64 * 10,
        body_bytes=4096,
        body_seconds=0.5,
    ),
)


@pytest.fixture(scope="module")
def small(begin: Any) -> Iterator[Any]:
    with begin(SMALL, cache_bytes=3 * 16 * 16 * 16 * 4) as running:
        yield running


def told(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not leaks(reply.text)
    return error


def leaks(text: str) -> bool:
    """Whether a reply shows where the server lies, or how it failed."""
    return any(sign in text for sign in ("Traceback", 'File "', "site-packages", str(ROOT), str(Path.home()) + "/"))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("prompt", "x" * 21, "21 characters, and the server allows 20"),
        ("prompt", "", "at least 1 character"),
        ("prompt", None, "valid string"),
        ("prompt", ["a", "b"], "valid string"),
        ("negative_prompt", "x" * 21, "allows 20"),
        ("n", 3, "3 images, and the server allows 2"),
        ("n", 0, "greater than or equal to 1"),
        ("n", "1", "valid integer"),
        ("n", True, "valid integer"),
        ("num_inference_steps", 9, "9 steps, and the server allows 8"),
        ("num_inference_steps", 2.5, "valid integer"),
        ("guidance_scale", -1, "greater than or equal to 0"),
        ("guidance_scale", 1e9, "less than or equal to 100"),
        ("seed", -1, "greater than or equal to 0"),
        ("seed", 2**63, "less than"),
        ("size", "128x64", "8192 pixels, and the server allows 4096"),
        ("size", "64x40", "nearest is 32"),
        ("size", "0x64", "WIDTHxHEIGHT"),
        ("size", "64\N{MULTIPLICATION SIGN}64", "WIDTHxHEIGHT"),
        ("size", "large", "WIDTHxHEIGHT"),
        ("response_format", "url", "stores no images"),
        ("response_format", "jpeg", "b64_json"),
        ("output_format", "webp", "'png'"),
        ("quality", "hd", "'auto'"),
        ("interval", 0, "greater than or equal to 1"),
        ("warmup", -1, "greater than or equal to 0"),
        ("schedule", "uniform", "not a schedule"),
        ("schedule", "quad:2:center=7", "centred on call 7"),
        ("cut", "deepcache:11", "it has deepcache:0"),
        ("timeout", 0, "greater than 0"),
        ("partial_images", 4, "less than or equal to 3"),
        ("partial_images", 1, "come in a stream"),
        ("stream", "yes", "valid boolean"),
        ("num_steps", 5, "no such field"),
    ],
)
def test_each_limit_is_told(field: str, value: object, says: str, small: Any) -> None:
    before = small.service.worker.statistics()
    reply = small.post({"prompt": "a", field: value})
    assert reply.status_code == 422
    error = told(reply)
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"
    after = small.service.worker.statistics()
    assert (after.ticks, after.queue_waits, after.in_flight) == (before.ticks, before.queue_waits, 0)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        ({"n": 2, "num_inference_steps": 6}, "49152 pixels times steps, and the server allows 40960"),
        ({"n": 2, "num_inference_steps": 4}, "fewer or smaller images"),  # features of four rows
        ({"interval": 2, "schedule": "uniform:2"}, "not both"),
        ({"stream": True, "n": 2}, "one image"),
        ({"schedule": "quad:2"}, "centred on call 15"),
    ],
)
def test_limits_of_several_fields(body: dict[str, Any], says: str, small: Any) -> None:
    before = small.service.worker.statistics().ticks
    reply = small.post({"prompt": "a", **body})
    assert reply.status_code == 422
    assert says in told(reply)["message"]
    assert small.service.worker.statistics().ticks == before


@pytest.mark.parametrize(
    ("content", "status", "code"),
    [
        (b"", 422, "invalid_request"),
        (b"{", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
        (b"[" * 4000, 400, "invalid_json"),
        (b'{"seed": ' + b"9" * 4000 + b', "prompt": "a"}', 422, "invalid_request"),
        (b'{"prompt": "a", "guidance_scale": NaN}', 422, "invalid_request"),
        (b'{"prompt": "\\ud800"}', 422, "invalid_request"),
        (b'{"prompt": "a", "\\ud800": 1}', 422, "invalid_request"),
        (b"[1]", 422, "invalid_request"),
        (b"null", 422, "invalid_request"),
    ],
)
def test_what_is_no_request_is_told_so(content: bytes, status: int, code: str, small: Any) -> None:
    reply = small.post(content=content, headers={"content-type": "application/json"})
    assert (reply.status_code, told(reply)["code"]) == (status, code)


def test_a_body_that_is_too_large_is_refused_unread(small: Any) -> None:
    reply = small.post({"prompt": "x" * 5000})
    assert (reply.status_code, told(reply)["code"]) == (422, "body_too_large")


def raw(server: Any, head: str, *parts: bytes, pause: float = 0.0) -> str:
    """What the server answers to these bytes; it should close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        request = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
        )
        connection.sendall(request.encode())
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        answer = b""
        while chunk := connection.recv(4096):
            answer += chunk
    return answer.decode()


def test_a_body_that_grows_too_large_on_its_way_is_cut_off(small: Any) -> None:
    chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"  # never ends
    answer = raw(small, "Transfer-Encoding: chunked", *[chunk] * 5)
    assert answer.startswith("HTTP/1.1 422")
    assert "connection: close" in answer.lower()
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_come_is_given_up(small: Any) -> None:
    answer = raw(small, "Content-Length: 100", b'{"prompt":')
    assert answer.startswith("HTTP/1.1 408")
    assert json.loads(answer.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_another_sites_page_cannot_ask(small: Any) -> None:
    """Without a preflight a browser sends text, or forms; and it says so if the page is of another site."""
    body = json.dumps({"prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = small.post(content=body, headers={"content-type": kind})
        assert (reply.status_code, told(reply)["code"]) == (415, "unsupported_media_type")
    assert small.post(content=body).status_code == 415
    for site in ("cross-site", "same-site"):
        reply = small.post({"prompt": "a"}, headers={"sec-fetch-site": site})
        assert (reply.status_code, told(reply)["code"]) == (403, "cross_site")
    preflight = httpx.options(f"{small.url}/v1/images/generations", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 415
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_a_name_that_points_here_is_not_enough(small: Any) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", ""):
        reply = small.get("/", headers={"host": host})
        assert (reply.status_code, told(reply)["code"]) == (421, "unknown_host")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
        assert small.get("/", headers={"host": host}).status_code == 200


def test_hosts_follow_the_address() -> None:
    assert allowed_hosts("127.0.0.1", ["Images.example"]) == ("127.0.0.1", "localhost", "::1", "images.example")
    assert allowed_hosts("0.0.0.0", []) is None
    assert allowed_hosts("0.0.0.0", ["a"]) == ("a",)


def test_every_reply_has_the_headers_of_a_careful_server(small: Any) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing", "/v2/health/live"):
        headers = small.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_other_paths_and_methods_are_told(small: Any) -> None:
    for path in ("/nothing", "/docs", "/page/../app.py", "/..%2fapp.py", "/v1/images/generations/"):
        reply = small.get(path)
        assert (reply.status_code, told(reply)["code"]) == (404, "not_found")
    assert told(small.get("/v1/images/generations"))["code"] == "method_not_allowed"


FIELDS = ["prompt", "model", "n", "size", "stream", "seed", "interval", "schedule", "num_inference_steps", "timeout"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=5) | JSON


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_no_body_makes_the_server_fail(body: bytes, small: Any) -> None:
    reply = small.post(content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404, 422, 504), reply.text  # 504: a deadline too short
    if reply.status_code != 200:
        told(reply)
    assert small.service.worker.statistics().in_flight == 0


def test_limits_must_allow_the_models_own_size(small: Any) -> None:
    for limits in (RequestLimits(pixels=64 * 63), RequestLimits(pixel_steps=64 * 64 * 29)):
        with pytest.raises(UserError, match="no image of this model's default size, 64x64 in 30 steps"):
            WorkerService(small.service.worker, small.service.model, ServeSettings(limits=limits))


def test_settings_that_make_no_sense_are_told() -> None:
    for wrong in ({"api_key": ""}, {"api_key": "ü"}, {"timeout": 0.0}, {"steps": 0}, {"steps": 999}):
        with pytest.raises(UserError):
            ServeSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="limit steps is 0"):
        RequestLimits(steps=0)
    assert "secret" not in repr(ServeSettings(api_key="secret"))
