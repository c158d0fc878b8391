"""Checks in worker processes, one process for each engine, so that a crash of one check does not fail the others.

An illegal memory access makes the CUDA context of a process unusable, and TensorRT and TensorRT-RTX cannot share a
process. When a process crashes, its running check is an error, and a new process runs the next check.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..worker_process import Answer, Channel, RequestFailed, WorkerProcess
from .catalog import catalog
from .check import CheckResult, GpuCheck, perform
from .workbench import GpuOptions, Workbench


def perform_isolated(
    checks: Sequence[GpuCheck],
    options: GpuOptions,
    folder: Path,
    log: Path,
    *,
    timeout: float,
    progress: Callable[[str], None],
    finished: Callable[[CheckResult], None],
    command: Sequence[str] | None = None,
) -> None:
    """Run checks of one engine in a worker process; a new process replaces one that a check has ended.

    Args:
        folder: directory for models and bundles.
        log: file for the output of the processes.
        timeout: seconds that a check may take.
        progress: called with a sentence before each slow step.
        finished: called with each result.
        command: command in place of the one that starts a worker process.
    """
    process: WorkerProcess | None = None
    try:
        for check in checks:
            if process is None:
                process = WorkerProcess(__name__, log, timeout, command=command)
            progress(check.title)
            setting: dict[str, Any] = {"options": asdict(options), "folder": str(folder)}
            try:
                answer = process.request("check", on_progress=progress, id=check.id, **setting)
                finished(CheckResult.model_validate(answer))
            except RequestFailed as error:
                reason = f"{error}; see {log.name}"
                finished(CheckResult(id=check.id, title=check.title, status="error", reason=reason))
            if not process.alive:
                process.close()
                process = None
    finally:
        if process is not None:
            process.close()


class CheckWorker:
    """The worker process's checks, which share a workbench."""

    def __init__(self, progress: Callable[[str], None]) -> None:
        self._progress = progress
        self._bench: Workbench | None = None

    def check(self, id: str, options: dict[str, Any], folder: str) -> Answer:
        """Run the check with this id."""
        run = GpuOptions.of_json(options)
        if self._bench is None:
            self._bench = self._workbench(run, Path(folder))
        (check,) = (check for check in catalog(run) if check.id == id)
        return perform(check, self._bench).model_dump(mode="json")

    def _workbench(self, options: GpuOptions, folder: Path) -> Workbench:
        import torch

        if options.device.startswith("cuda"):
            torch.cuda.set_device(options.device)
        torch.backends.cudnn.allow_tf32 = False  # the fp32 references need full precision
        torch.backends.cuda.matmul.allow_tf32 = False
        return Workbench(options, folder, self._progress)


def main() -> None:
    channel = Channel()
    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    worker = CheckWorker(lambda step: channel.send("progress", step))
    channel.answer({"check": worker.check})


if __name__ == "__main__":
    main()
