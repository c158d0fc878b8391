"""``offcut serve`` as a process: signals, exit codes, what is missing."""

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

SLOWED = """
import os, time
from offcut.engines.onnxruntime.pair import BoundOnnxRuntimePair as Pair
from offcut.cli import main

def slowed(real):
    def call(self, *cut):
        time.sleep(0.05)
        if os.path.exists(os.environ["TRIGGER"]):
            raise RuntimeError("cannot read /secret/engine.plan")
        return real(self, *cut)
    return call

Pair.full, Pair.shallow = slowed(Pair.full), slowed(Pair.shallow)
main()
"""
LONG = {"prompt": "a", "num_inference_steps": 60, "interval": 4, "stream": True}


@contextmanager
def serving(bundle: Path, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process with engines slowed down, and its address; they fail once the file ``trigger`` is there."""
    arguments = ["serve", str(bundle), "--port", "0", "--engine", "onnxruntime", "--threads", "1", "--drain", "60"]
    environment = {**os.environ, "TRIGGER": str(folder / "trigger")}
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, *arguments], stderr=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if match := re.search(r"tiny-sd on (http://127\.0\.0\.1:\d+)$", line.strip()):
                yield process, match[1]
                break
        else:
            raise AssertionError(said)
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


def after_a_step(address: str, then: Callable[[], None]) -> str:
    """The text of a stream; something is done once it has begun."""
    text = ""
    with httpx.stream("POST", f"{address}/v1/images/generations", json=LONG, timeout=60) as reply:
        for part in reply.iter_text():
            if not text:
                then()
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

        text = after_a_step(address, stop)
        assert '"type": "image_generation.completed"' in text
        assert text.endswith("data: [DONE]\n\n")
        assert process.wait(60) == 0


@pytest.mark.slow
def test_an_engine_fault_ends_the_process(tiny_bundle: Path, tmp_path: Path) -> None:
    with serving(tiny_bundle, tmp_path) as (process, address):
        text = after_a_step(address, (tmp_path / "trigger").touch)
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
def test_a_missing_package_is_told(module: str, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
    said = command("serve", "x.offcut", fails=True)
    assert f"the package {module.replace('_', '-')}" in said
    assert "pip install 'offcut[serve]'" in said


@pytest.mark.slow
def test_what_cannot_be_served_is_told(unet_bundle: Path, tmp_path: Path, command: Callable[..., str]) -> None:
    import socket

    assert "is not an offcut bundle" in command("serve", tmp_path, "--port", "0", fails=True)
    assert "use offcut.UNet.load" in command("serve", unet_bundle, "--port", "0", fails=True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "give another --host or --port" in command("serve", unet_bundle, "--port", port, fails=True)
