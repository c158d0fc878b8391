"""Requests above a limit, invalid bodies, and requests from other hosts or sites are refused before any work."""

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
from offcut.errors import LimitError, UserError
from offcut.runtime.server.models import ServedModel
from offcut.runtime.server.params import resolve_request
from offcut.runtime.server.schemas import GenerationRequest
from offcut.runtime.server.service import WorkerService
from offcut.runtime.server.settings import RequestLimits, ServeSettings, allowed_hosts

ROOT = Path(offcut.__file__).parent
LOW_LIMITS = ServeSettings(
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
def limited_server(start_server: Any) -> Iterator[Any]:
    with start_server(LOW_LIMITS, cache_bytes=3 * 16 * 16 * 16 * 4) as running:
        yield running


def error_of(reply: httpx.Response) -> dict[str, Any]:
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert not leaks(reply.text)
    return error


def leaks(text: str) -> bool:
    """Return whether a reply shows a path of the server or a traceback."""
    return any(leak in text for leak in ("Traceback", 'File "', "site-packages", str(ROOT), str(Path.home()) + "/"))


@pytest.mark.parametrize(
    ("field", "value", "message"),
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
def test_a_field_out_of_range_is_refused(field: str, value: object, message: str, limited_server: Any) -> None:
    before = limited_server.service.worker.statistics()
    reply = limited_server.post({"prompt": "a", field: value})
    assert reply.status_code == 422
    error = error_of(reply)
    assert message in error["message"]
    assert error["type"] == "invalid_request_error"
    after = limited_server.service.worker.statistics()
    assert (after.ticks, after.queue_waits, after.in_flight) == (before.ticks, before.queue_waits, 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 2, "num_inference_steps": 6}, "49152 pixels times steps, and the server allows 40960"),
        ({"n": 2, "num_inference_steps": 4}, "fewer or smaller images"),  # cached features of four rows
        ({"interval": 2, "schedule": "uniform:2"}, "not both"),
        ({"stream": True, "n": 2}, "one image"),
        ({"schedule": "quad:2"}, "centred on call 15"),
    ],
)
def test_a_combination_of_fields_is_refused(body: dict[str, Any], message: str, limited_server: Any) -> None:
    before = limited_server.service.worker.statistics().ticks
    reply = limited_server.post({"prompt": "a", **body})
    assert reply.status_code == 422
    assert message in error_of(reply)["message"]
    assert limited_server.service.worker.statistics().ticks == before


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
def test_an_invalid_body_is_refused(content: bytes, status: int, code: str, limited_server: Any) -> None:
    reply = limited_server.post(content=content, headers={"content-type": "application/json"})
    assert (reply.status_code, error_of(reply)["code"]) == (status, code)


def test_a_body_that_declares_too_many_bytes_is_refused_unread(limited_server: Any) -> None:
    reply = limited_server.post({"prompt": "x" * 5000})
    assert (reply.status_code, error_of(reply)["code"]) == (422, "body_too_large")


def send_raw(server: Any, head: str, *parts: bytes, pause: float = 0.0) -> str:
    """Send bytes and return the reply; the server should close the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        request = (
            f"POST /v1/images/generations HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{head}\r\n\r\n"
        )
        connection.sendall(request.encode())
        for part in parts:
            connection.sendall(part)
            time.sleep(pause)
        reply = b""
        while chunk := connection.recv(4096):
            reply += chunk
    return reply.decode()


def test_a_body_of_unknown_size_is_cut_off_at_the_limit(limited_server: Any) -> None:
    chunk = b"400\r\n" + b" " * 0x400 + b"\r\n"  # without a last chunk
    reply = send_raw(limited_server, "Transfer-Encoding: chunked", *[chunk] * 5)
    assert reply.startswith("HTTP/1.1 422")
    assert "connection: close" in reply.lower()
    assert json.loads(reply.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_large"


def test_a_body_that_does_not_arrive_is_given_up(limited_server: Any) -> None:
    reply = send_raw(limited_server, "Content-Length: 100", b'{"prompt":')
    assert reply.startswith("HTTP/1.1 408")
    assert json.loads(reply.partition("\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_pages_of_other_sites_are_refused(limited_server: Any) -> None:
    """Without a preflight, browsers send text and forms only; ``Sec-Fetch-Site`` marks requests of other sites."""
    body = json.dumps({"prompt": "a"})
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        reply = limited_server.post(content=body, headers={"content-type": kind})
        assert (reply.status_code, error_of(reply)["code"]) == (415, "unsupported_media_type")
    assert limited_server.post(content=body).status_code == 415
    for site in ("cross-site", "same-site"):
        reply = limited_server.post({"prompt": "a"}, headers={"sec-fetch-site": site})
        assert (reply.status_code, error_of(reply)["code"]) == (403, "cross_site")
    preflight = httpx.options(f"{limited_server.url}/v1/images/generations", headers={"origin": "http://evil.example"})
    assert preflight.status_code == 415
    assert not [name for name in preflight.headers if name.startswith("access-control")]


def test_unknown_host_names_are_refused(limited_server: Any) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "[::1].evil.example", "[::1]x:1", ""):
        reply = limited_server.get("/", headers={"host": host})
        assert (reply.status_code, error_of(reply)["code"]) == (421, "unknown_host")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1", "[::1]:8000"):
        assert limited_server.get("/", headers={"host": host}).status_code == 200


def test_allowed_hosts_depend_on_the_address() -> None:
    assert allowed_hosts("127.0.0.1", ["Images.example"]) == ("127.0.0.1", "localhost", "::1", "images.example")
    assert allowed_hosts("0.0.0.0", []) is None
    assert allowed_hosts("0.0.0.0", ["a"]) == ("a",)


def test_a_call_that_would_outlast_the_request_is_refused(pipe: Any) -> None:
    model = ServedModel(pipe, "tiny")
    model.timed_call = 20.0, 2
    server_settings = ServeSettings(timeout=100, limits=RequestLimits(pixels=2**20))
    width, height = model.size
    body = GenerationRequest(prompt="a", size=f"{2 * width}x{height}")
    assert resolve_request(body, model, server_settings, 2**30).call_seconds == 80
    with pytest.raises(LimitError, match="is expected to take 320 s, and the request's time limit is 100 s"):
        resolve_request(body.model_copy(update={"size": f"{2 * width}x{2 * height}"}), model, server_settings, 2**30)


def test_an_image_has_at_most_four_times_the_default_pixels(pipe: Any) -> None:
    model, server_settings = ServedModel(pipe, "tiny"), ServeSettings()
    width, height = model.size
    resolve_request(GenerationRequest(prompt="a", size=f"{2 * width}x{2 * height}"), model, server_settings, 2**30)
    with pytest.raises(LimitError, match="pixels, and the server allows"):
        resolve_request(GenerationRequest(prompt="a", size=f"{4 * width}x{2 * height}"), model, server_settings, 2**30)


def test_skip_is_no_cut_of_a_request(pipe: Any) -> None:
    with pytest.raises(LimitError, match="skip is not a cut"):
        resolve_request(GenerationRequest(prompt="a", cut="skip"), ServedModel(pipe, "tiny"), ServeSettings(), 2**30)


def test_every_reply_has_the_security_headers(limited_server: Any) -> None:
    for path in ("/", "/page.js", "/v1/models", "/nothing", "/v2/health/live"):
        headers = limited_server.get(path).headers
        assert "default-src 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_unknown_paths_and_methods_are_refused(limited_server: Any) -> None:
    for path in ("/nothing", "/docs", "/page/../app.py", "/..%2fapp.py", "/v1/images/generations/"):
        reply = limited_server.get(path)
        assert (reply.status_code, error_of(reply)["code"]) == (404, "not_found")
    assert error_of(limited_server.get("/v1/images/generations"))["code"] == "method_not_allowed"


FIELDS = ["prompt", "model", "n", "size", "stream", "seed", "interval", "schedule", "num_inference_steps", "timeout"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
BODIES = st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=8), JSON, max_size=5) | JSON


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=BODIES.map(json.dumps).map(str.encode) | st.binary(max_size=60))
def test_no_body_makes_the_server_fail(body: bytes, limited_server: Any) -> None:
    reply = limited_server.post(content=body, headers={"content-type": "application/json"})
    assert reply.status_code in (200, 400, 404, 422, 504), reply.text  # 504: the deadline was too short
    if reply.status_code != 200:
        error_of(reply)
    assert limited_server.service.worker.statistics().in_flight == 0


def test_limits_must_allow_the_default_size(limited_server: Any) -> None:
    for limits in (RequestLimits(pixels=64 * 63), RequestLimits(pixel_steps=64 * 64 * 29)):
        with pytest.raises(UserError, match="no image of this model's default size, 64x64 in 30 steps"):
            WorkerService(limited_server.service.worker, limited_server.service.model, ServeSettings(limits=limits))


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"api_key": ""}, {"api_key": "ü"}, {"timeout": 0.0}, {"steps": 0}, {"steps": 999}):
        with pytest.raises(UserError):
            ServeSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="limit steps is 0"):
        RequestLimits(steps=0)
    assert "secret" not in repr(ServeSettings(api_key="secret"))
