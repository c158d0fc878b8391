"""Worker processes: replies, errors, the end of a process, and its resources."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from offcut.benchmarks.latency.rounds import WORKER
from offcut.benchmarks.worker_process import RequestFailed, WorkerProcess, describe_error
from offcut.errors import EngineError

ECHO = """
from offcut.benchmarks.worker_process import Channel

def shout(text):
    print("a library prints to standard output")
    channel.send("progress", "shouting")
    return {"text": text.upper()}

channel = Channel()
channel.answer({"shout": shout})
"""


def python_that(code: str, tmp_path: Path) -> str:
    """Return an interpreter that ignores its arguments and runs this code."""
    python = tmp_path / "python"
    python.write_text(f"#!{sys.executable}\n{code}")
    python.chmod(0o755)
    return str(python)


def test_a_request_is_answered_with_progress_and_a_result(tmp_path: Path) -> None:
    process = WorkerProcess("", tmp_path / "log", 60, command=(sys.executable, "-c", ECHO))
    steps: list[str] = []
    assert process.request("shout", on_progress=steps.append, text="a") == {"text": "A"}
    with pytest.raises(RequestFailed, match=r"TypeError: .*unexpected keyword argument"):
        process.request("shout", words="a")
    with pytest.raises(RequestFailed, match="KeyError: 'whisper'"):
        process.request("whisper")
    assert process.request("shout", text="b") == {"text": "B"}
    assert steps == ["shouting"]
    assert process.alive
    assert process.cpu_seconds() > 0
    assert process.close() == 0
    assert not process.alive
    log = (tmp_path / "log").read_text()
    assert "a library prints to standard output" in log
    assert "Traceback" in log


def test_the_last_line_of_an_ended_process_is_the_reason(tmp_path: Path) -> None:
    python = python_that("import sys\nprint('the last line', file=sys.stderr)\nsys.exit(3)\n", tmp_path)
    process = WorkerProcess(WORKER, tmp_path / "log", 60, python=python, threads=1)
    with pytest.raises(RequestFailed) as failed:
        process.request("loop", name="x", calls=1)
    assert str(failed.value) == "its process ended with exit code 3; its last line in log: the last line"
    assert not process.alive
    assert process.close() == 3


def test_a_process_that_takes_too_long_is_killed(tmp_path: Path) -> None:
    python = python_that("import time\ntime.sleep(60)\n", tmp_path)
    process = WorkerProcess(WORKER, tmp_path / "log", 0.5, python=python)
    assert process.mapped_bytes() > 0
    began = time.monotonic()
    with pytest.raises(RequestFailed, match="was killed"):
        process.request("loop", name="x", calls=1)
    assert time.monotonic() - began < 30
    assert process.mapped_bytes() == 0
    process.close()


def test_a_missing_interpreter_is_reported(tmp_path: Path) -> None:
    process = WorkerProcess(WORKER, tmp_path / "log", 1, python=str(tmp_path / "none"))
    with pytest.raises(RequestFailed, match="cannot be started: No such file or directory"):
        process.request("loop", name="x", calls=1)
    assert not process.alive
    assert process.close() is None


def test_a_latency_worker_reports_errors_and_ends_with_its_input(tmp_path: Path) -> None:
    process = WorkerProcess(WORKER, tmp_path / "log", 120, threads=1)
    with pytest.raises(RequestFailed, match=r"^KeyError"):
        process.request("loop", name="nobody", calls=1)
    assert process.alive
    assert process.cpu_seconds() > 0
    process.close()
    assert not process.alive
    assert "Traceback" in (tmp_path / "log").read_text()


def test_an_error_is_described_in_one_line() -> None:
    assert describe_error(EngineError("no engine\nmore")) == "no engine more"
    assert describe_error(KeyError("x")) == "KeyError: 'x'"
    assert describe_error(RuntimeError()) == "RuntimeError"
