"""A Python module in a child process, which answers requests in JSON lines and ends with its parent.

A request is ``{"request": name, **arguments}``. The child replies with any number of ``{"progress": text}`` lines and
then with ``{"ok": result}`` or ``{"error": reason}``.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue
from typing import Any

Answer = dict[str, Any]
Handler = Callable[..., Any]


class RequestFailed(Exception):
    """A request failed; the message is the handler's error, or says how the process ended."""


class WorkerProcess:
    """A child process that runs ``python -m module`` and answers requests one after the other.

    Args:
        module: name of a module whose ``main`` calls ``Channel.answer``.
        log: file to which the output of the child and its libraries is appended.
        timeout: seconds that the child may take for one line of its reply.
        python: Python interpreter; the current one by default.
        threads: number of threads of the child's libraries, which read it from the environment when they are loaded.
        command: command in place of ``python -m module``.
    """

    def __init__(
        self,
        module: str,
        log: Path,
        timeout: float,
        *,
        python: str | None = None,
        threads: int | None = None,
        command: Sequence[str] | None = None,
    ) -> None:
        self._timeout, self._log = timeout, log
        self._process: subprocess.Popen[str] | None = None
        self._start_error = ""
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        if threads is not None:
            environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
        program = python or sys.executable
        try:
            with log.open("ab") as messages:
                self._process = subprocess.Popen(
                    command or [program, "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    env=environment,
                )
        except OSError as error:
            self._start_error = f"{program} cannot be started: {error.strerror}"

    def request(
        self, request: str, /, *, on_progress: Callable[[str], None] = lambda text: None, **arguments: Any
    ) -> Answer:
        """Send a request and wait for its result.

        Raises:
            RequestFailed: the handler raised an error, or the child took too long or ended.
        """
        process = self._process
        if process is None:
            raise RequestFailed(self._start_error)
        assert process.stdin is not None
        with suppress(BrokenPipeError):  # the child has ended: its exit code is reported below
            process.stdin.write(json.dumps({"request": request, **arguments}) + "\n")
            process.stdin.flush()
        while line := self._read_line(process):
            message = json.loads(line)
            if "progress" in message:
                on_progress(message["progress"])
            elif "error" in message:
                raise RequestFailed(message["error"])
            else:
                result = message["ok"]
                assert isinstance(result, dict)
                return result
        raise RequestFailed(self._ending(process.wait()))

    def _read_line(self, process: subprocess.Popen[str]) -> str:
        assert process.stdout is not None
        killer = threading.Timer(self._timeout, process.kill)
        killer.daemon = True
        killer.start()
        try:
            return process.stdout.readline()
        finally:
            killer.cancel()

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int | None:
        """Process id; None where no process could be started."""
        return None if self._process is None else self._process.pid

    def mapped_bytes(self) -> int:
        """Return the bytes of memory mapped from files; 0 where they are unknown or the child has ended."""
        import psutil

        try:
            return int(getattr(psutil.Process(self.pid).memory_info(), "shared", 0)) if self._process else 0
        except psutil.NoSuchProcess:
            return 0

    def cpu_seconds(self) -> float:
        """Return the processor time in seconds of all threads so far; 0 where the child has ended."""
        import psutil

        try:
            times = psutil.Process(self.pid).cpu_times() if self._process is not None else None
        except psutil.NoSuchProcess:
            return 0.0
        return 0.0 if times is None else float(times.user + times.system)

    def close(self, grace: float = 30.0) -> int | None:
        """Close the child's input, which ends the child, and wait until its memory is free.

        Args:
            grace: seconds until the child is killed.

        Returns:
            The exit code; None where no process could be started.
        """
        process = self._process
        if process is None:
            return None
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(grace)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        return process.returncode

    def last_log_line(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        return lines[-1].strip()

    def _ending(self, code: int) -> str:
        if code == -signal.SIGKILL:
            return f"its process was killed: memory ran out, or {self._timeout:g} s were exceeded"
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"its process {how}; its last line in {self._log.name}: {self.last_log_line()}"


class Channel:
    """The child's side of the connection, which iterates over requests and sends replies.

    Standard output carries replies only; the output of libraries goes to standard error.

    Args:
        parent_gone: called in a thread once the parent has closed the input or ended. By default it ends this process,
            even in the middle of a request.
    """

    def __init__(self, parent_gone: Callable[[], object] = lambda: os._exit(0)) -> None:
        self._answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self._requests: SimpleQueue[str] = SimpleQueue()
        self._parent_gone = parent_gone
        threading.Thread(target=self._read, daemon=True).start()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield json.loads(self._requests.get())

    def send(self, kind: str, value: Any) -> None:
        """Write one line of the given kind, which is ``progress``, ``ok`` or ``error``."""
        self._answers.write(json.dumps({kind: value}) + "\n")
        self._answers.flush()

    def answer(self, handlers: Mapping[str, Handler]) -> None:
        """Call the handler that each request names, with the request's arguments, until the parent has ended."""
        for arguments in self:
            try:
                self.send("ok", handlers[arguments.pop("request")](**arguments))
            except Exception as error:  # from any library: the parent decides what to do
                import traceback

                traceback.print_exc()
                self.send("error", describe_error(error))

    def _read(self) -> None:
        # Not sys.stdin: the interpreter waits for its lock when it exits.
        with os.fdopen(os.dup(0), encoding="utf-8") as stream:
            for line in stream:
                self._requests.put(line)
        self._parent_gone()


def describe_error(error: BaseException) -> str:
    """Return the error in one line; the class is named unless it is offcut's own."""
    text = " ".join(str(error).split())
    own = type(error).__module__.startswith("offcut.")
    return text if own and text else f"{type(error).__name__}: {text}".removesuffix(": ")
