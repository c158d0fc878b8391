"""Processes that share the work of a run end with their parent."""

from __future__ import annotations

import signal
import subprocess
import sys
import time

import psutil

_FIRST = """
from offcut.benchmarks.quality.pool import _prepare, _run
if __name__ == "__main__":
    jobs = [("print(__import__('os').getpid(), flush=True)",), ("__import__('time').sleep(600)",)]
    _run(1, (_prepare, 1), eval, jobs, print)
"""


def test_no_process_outlives_its_parent() -> None:
    first = subprocess.Popen([sys.executable, "-c", _FIRST], stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    worker = int(first.stdout.readline())
    assert _runs(worker)
    first.send_signal(signal.SIGKILL)
    first.wait()
    deadline = time.monotonic() + 30
    while _runs(worker):
        assert time.monotonic() < deadline, "it still runs"
        time.sleep(0.1)
    first.stdout.close()


def _runs(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
