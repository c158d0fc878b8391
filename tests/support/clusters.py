"""``offcut serve --ray`` as a process, with a cluster of its own: two replicas on the CPU."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

KEY = "a key"
LIMIT = 240.0
"""Seconds that anything may take on a busy machine; nothing waits so long where it goes well."""


@dataclass
class Cluster:
    """Attributes:
    url: of the server.
    address: of the cluster.
    """

    process: subprocess.Popen[str]
    url: str
    address: str

    def post(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        options = {"headers": {"authorization": f"Bearer {KEY}"}, "timeout": LIMIT, **options}
        return httpx.post(f"{self.url}/v1/images/generations", json=body, **options)

    def stream(self, client: httpx.Client, body: dict[str, Any]) -> httpx.Response:
        """A reply whose body is not read."""
        headers = {"authorization": f"Bearer {KEY}"}
        url = f"{self.url}/v1/images/generations"
        request = client.build_request("POST", url, json={**body, "stream": True}, headers=headers, timeout=LIMIT)
        return client.send(request, stream=True)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", headers={"authorization": f"Bearer {KEY}"}, timeout=LIMIT)

    def replicas(self) -> dict[int, psutil.Process]:
        """The processes that draw, by number."""
        found = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "ServeReplica:offcut:Replica" in " ".join(process.cmdline()):
                    found[process.pid] = process
            except psutil.Error:
                continue  # it has just ended
        return found


@contextmanager
def serving(bundles: Sequence[Path], options: Sequence[str]) -> Iterator[Cluster]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["serve", *map(str, bundles), "--ray", "--port", str(port), *options]
    process = subprocess.Popen(
        [sys.executable, "-m", "offcut", *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OFFCUT_API_KEY": KEY},
    )
    watch = threading.Timer(LIMIT, process.kill)
    watch.start()
    try:
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if re.search(rf" on http://127\.0\.0\.1:{port}$", line.strip()):
                break
        else:
            raise AssertionError(said)
        watch.cancel()
        (address,) = re.findall(r"^cluster (\S+)$", said, flags=re.MULTILINE)
        yield Cluster(process, f"http://127.0.0.1:{port}", address)
    finally:
        watch.cancel()
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def until(so: Callable[[], Any], seconds: float = LIMIT) -> Any:
    """Wait until something is so, and return it."""
    deadline = time.monotonic() + seconds
    while not (answer := so()):
        assert time.monotonic() < deadline, "it did not come to be"
        time.sleep(0.05)
    return answer
