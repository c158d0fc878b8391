"""``offcut serve`` as a process: signals, exit codes, missing packages."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

SLOW_SERVER = """
import os, time
from offcut.engines.onnxruntime.pair import BoundOnnxRuntimePair as Pair
from offcut.cli import main

def slow(real):
    def call(self, *cut):
        time.sleep(0.05)
        if os.path.exists(os.environ["TRIGGER"]):
            raise RuntimeError("cannot read /secret/engine.plan")
        return real(self, *cut)
    return call

Pair.full, Pair.shallow = slow(Pair.full), slow(Pair.shallow)
main()
"""
LONG = {"prompt": "a", "num_inference_steps": 60, "interval": 4, "stream": True}


@contextmanager
def serving(bundle: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process with slow engines, and its address; the engines fail once the file ``trigger`` exists."""
    arguments = ["serve", str(bundle), "--port", "0", "--engine", "onnxruntime", "--threads", "1", "--drain", "60"]
    environment = {**os.environ, "TRIGGER": str(folder / "trigger")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_SERVER, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        output = ""
        for line in process.stderr:
            output += line
            if match := re.search(r"tiny-sd on (http://127\.0\.0\.1:\d+)$", line.strip()):
                yield process, match[1]
                break
        else:
            raise AssertionError(output)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def read_stream(address: str, after_first_event: Callable[[], None]) -> str:
    """Return the text of a stream; call a function once it has begun."""
    text = ""
    with httpx.stream("POST", f"{address}/v1/images/generations", json=LONG, timeout=60) as reply:
        for part in reply.iter_text():
            if not text:
                after_first_event()
            text += part
    return text


@pytest.mark.slow
def test_sigterm_lets_requests_finish(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, tmp_path) as (process, address):
        assert httpx.get(f"{address}/v2/health/ready").json() == {"ready": True}

        def stop() -> None:
            process.send_signal(signal.SIGTERM)
            deadline = time.monotonic() + 10
            while httpx.get(f"{address}/v2/health/ready").status_code != 503:
                assert time.monotonic() < deadline
            refused = httpx.post(f"{address}/v1/images/generations", json={"prompt": "a"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")

        text = read_stream(address, stop)
        assert '"type": "image_generation.completed"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert process.wait(60) == 0


@pytest.mark.slow
def test_an_engine_fault_ends_the_process(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, tmp_path) as (process, address):
        text = read_stream(address, (tmp_path / "trigger").touch)
        last = text.rstrip().split("\n\n")[-1]
        assert json.loads(last.partition("data: ")[2])["error"]["code"] == "engine_fault"
        assert "secret" not in text
        deadline = time.monotonic() + 2
        while httpx.get(f"{address}/v2/health/ready").status_code != 503:
            assert time.monotonic() < deadline
        assert process.wait(60) not in (0, None)
        assert process.stderr is not None
        assert "EngineFaultError" in process.stderr.read()


@pytest.mark.parametrize("module", ["fastapi", "uvicorn", "prometheus_client"])
def test_a_missing_package_is_named(module: str, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    output = command("serve", "x.offcut", fails=True)
    assert f"the package {module.replace('_', '-')}" in output
    assert "pip install 'offcut[serve]'" in output


@pytest.mark.slow
def test_an_unusable_bundle_or_port_is_refused(unet_bundle: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    import socket

    assert "is not an offcut bundle" in command("serve", tmp_path, "--port", "0", fails=True)
    assert "use offcut.UNet.load" in command("serve", unet_bundle, "--port", "0", fails=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "give another --host or --port" in command("serve", unet_bundle, "--port", port, fails=True)
