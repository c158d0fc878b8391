"""The processes that contestants run in: started, asked, and closed when memory is short."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import Any

WORKER = "offcut.benchmarks.latency.worker"


Answer = dict[str, Any]
"""What a house answers; ``{"error": reason}`` where it could not do what it was asked."""


class Process:
    """A house that is open.

    Args:
        python: the interpreter.
        threads: of each contestant, through the environment too, since libraries read it when they are loaded.
        log: what the process and its libraries print is added to this file.
        timeout: seconds that an answer may take.
    """

    def __init__(self, python: str | None, threads: int, log: Path, timeout: float) -> None:
        self.opened: set[str] = set()
        """The contestants that are open and warm in it."""
        self._timeout = timeout
        self._log = log
        self._process: subprocess.Popen[str] | None = None
        self._failed = ""
        names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(names, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
        try:
            with log.open("ab") as messages:
                self._process = subprocess.Popen(
                    [python or sys.executable, "-m", WORKER],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    env=environment,
                )
        except OSError as error:
            self._failed = f"{python} cannot be started: {error.strerror}"

    def ask(self, do: str, **arguments: Any) -> Answer:
        """Send a request (``worker``'s docstring has them) and wait; an error is its own or how the process ended."""
        process = self._process
        if process is None:
            return {"error": self._failed}
        assert process.stdin is not None
        assert process.stdout is not None
        watch = Timer(self._timeout, process.kill)
        watch.daemon = True
        watch.start()
        try:
            with suppress(BrokenPipeError):  # it has ended already, and how is told below
                process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
        finally:
            watch.cancel()
        if not line:
            return {"error": self._ending(process.wait())}
        answer = json.loads(line)
        done = answer.get("ok", answer)
        assert isinstance(done, dict)
        return done

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def resident(self) -> int:
        """Its memory at present, in bytes; 0 once it has ended."""
        return self._memory("rss")

    def mapped(self) -> int:
        """What of it is mapped from files, in bytes; 0 where the system does not tell."""
        return self._memory("shared")

    def cpu_seconds(self) -> float:
        """Processor time that it has used so far, all threads together."""
        import psutil

        if self._process is None:
            return 0.0
        try:
            times = psutil.Process(self._process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return float(times.user + times.system)

    def close(self) -> None:
        """End the process and wait for it, so that its memory is free again."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _memory(self, kind: str) -> int:
        import psutil

        try:
            return int(getattr(psutil.Process(self._process.pid).memory_info(), kind, 0)) if self._process else 0
        except psutil.NoSuchProcess:
            return 0

    def _ending(self, code: int) -> str:
        if code == -signal.SIGKILL:
            return f"its process was killed, for want of memory or after {self._timeout:g} s"
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        return f"its process {how}, saying last: {lines[-1].strip()}"


def to_close(resident: Mapping[str, int], turns: Sequence[str], need: int, available: int) -> list[str]:
    """The houses to close before one that needs so much memory is opened, in order; none if there is room.

    The one whose next turn is furthest away goes first, which is the best there is where turns repeat: closing the one
    unused for longest would always close the one that comes next.

    Args:
        resident: bytes that each open house holds.
        turns: houses in the order of the turns to come, more than a round of them.
        need: bytes.
        available: bytes that are free now.
    """
    closed: list[str] = []
    left = dict(resident)
    while available < need and left:
        furthest = max(left, key=lambda house: turns.index(house) if house in turns else len(turns))
        available += left.pop(furthest)
        closed.append(furthest)
    return closed
