"""Each engine's checks in a process of their own, so that what one of them breaks does not fail the others.

An illegal access leaves a process's CUDA context unusable, TensorRT and TensorRT-RTX exclude one another, and a crash
takes its process along. The check that was running then is an error, and a new process goes on behind it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Timer

from .check import Check, Result
from .report import result_of_json
from .workbench import Options

WORKER = (sys.executable, "-m", "offcut.benchmarks.gpu.worker")


def perform_apart(
    checks: Sequence[Check],
    options: Options,
    folder: Path,
    log: Path,
    *,
    timeout: float,
    progress: Callable[[str], None],
    finished: Callable[[Result], None],
    worker: Sequence[str] = WORKER,
) -> None:
    """Run checks, all of one engine, in as many processes as it takes.

    Args:
        folder: for models and bundles.
        log: what the process and its libraries print is added to this file.
        timeout: seconds that a check may take.
        progress: called with a sentence as something slow begins.
        finished: called with each result.
        worker: the command that is given the request.
    """
    remaining = {check.id: check for check in checks}
    while remaining:
        running: str | None = None
        request = json.dumps({"options": options.as_json(), "folder": str(folder), "checks": list(remaining)})
        with log.open("ab") as messages:
            process = subprocess.Popen(
                worker, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=messages, text=True
            )
            assert process.stdin is not None
            assert process.stdout is not None
            watch = _watch(process, timeout)
            with process, process.stdin, process.stdout:
                with suppress(BrokenPipeError):  # it has ended already, and how is told below
                    process.stdin.write(request)
                    process.stdin.close()
                for line in process.stdout:
                    watch.cancel()
                    watch = _watch(process, timeout)
                    answer = json.loads(line)
                    if "begin" in answer:
                        running = answer["begin"]
                        progress(remaining[running].title)
                    elif "progress" in answer:
                        progress(answer["progress"])
                    else:
                        result = result_of_json(answer["result"])
                        del remaining[result.id]
                        running = None
                        finished(result)
            watch.cancel()
        if remaining:  # the process ended before its time
            how = _ending(process.returncode, timeout)
            lost = [running] if running is not None else list(remaining)
            for identifier in lost:
                check = remaining.pop(identifier)
                where = "during this check" if running is not None else "before it began"
                finished(Result(check.id, check.title, "error", f"its process {how} {where}; see {log.name}"))


def _watch(process: subprocess.Popen[str], timeout: float) -> Timer:
    timer = Timer(timeout, process.kill)
    timer.daemon = True
    timer.start()
    return timer


def _ending(code: int, timeout: float) -> str:
    if code == -signal.SIGKILL:
        return f"was killed, for want of memory or after {timeout:g} s,"
    if code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"
