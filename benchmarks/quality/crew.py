"""Several processes make a run's pictures, each with the engines open for itself; the parts that they leave are read.

A small model gains more from pictures side by side than from threads inside one call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ...errors import UserError
from . import pictures
from .pictures import Progress, Task
from .plan import Setting


def make(
    bundle: Path,
    engine: str,
    task: Task,
    settings: Sequence[Setting],
    folder: Path,
    *,
    workers: int,
    threads: int | None = None,
    on_call: Progress = lambda count: None,
) -> None:
    """Make every part that `folder` lacks, as `pictures.make` does one after the other.

    Args:
        bundle: its directory.
        workers: processes.
        threads: of each; the cores divided among them by default.
        on_call: told of a part's UNet calls once it is there.

    Raises:
        UserError: `folder` cannot be written, or a process was killed, for want of memory as a rule.
    """
    jobs = [(setting, first) for setting in settings for first in pictures.missing_parts(task, setting, folder)]
    if not jobs:
        return
    each = threads or max(1, (os.cpu_count() or 1) // workers)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        min(workers, len(jobs)), multiprocessing.get_context("spawn"), _open, (bundle, engine, each)
    )
    with pool:
        try:
            waiting = {pool.submit(_part, task, setting, first, folder): (setting, first) for setting, first in jobs}
            for done in as_completed(waiting):
                made = done.result()
                on_call(made * waiting[done][0].steps)
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} processes was killed, for want of memory as a rule: ask for fewer with --workers; "
                "the same command goes on where it stopped"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


_pipe: Any = None  # of this process, when it is a worker


def _open(bundle: Path, engine: str, threads: int) -> None:
    global _pipe
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's reaches all of them; the first process ends the rest
    import torch

    from ...runtime.pipeline import load
    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    _pipe = load(bundle, engine=engine, threads=threads)


def _part(task: Task, setting: Setting, first: int, folder: Path) -> int:
    """How many pictures the part has, once it lies in `folder`."""
    return len(pictures.make_part(_pipe, task, setting, first, folder).pictures)
