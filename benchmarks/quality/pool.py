"""Processes that generate the images of a run, each with its own engines.

With a small model, several images at the same time gain more than several threads in one call.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from ...errors import UserError
from . import pictures
from .pictures import ImageTask, Progress, missing_parts
from .plan import QualitySetting


def make(
    bundle: Path,
    engine: str,
    task: ImageTask,
    settings: Sequence[QualitySetting],
    folder: Path,
    *,
    workers: int,
    threads: int | None = None,
    on_call: Progress = lambda count: None,
) -> None:
    """Generate every part that is missing in `folder`, like `pictures.make`, in several processes.

    Args:
        workers: number of processes.
        threads: number of threads in each process; by default the processes share the cores.
        on_call: called once a part is written, with its UNet calls times its images.

    Raises:
        UserError: `folder` cannot be written, or a process was killed, usually for lack of memory.
    """
    jobs = [(task, setting, first, folder) for setting in settings for first in missing_parts(task, setting, folder)]
    opening = (_open, bundle, engine, threads or _share(workers))
    _run(workers, opening, _part, jobs, lambda place, images: on_call(images * jobs[place][1].steps))


def _share(workers: int) -> int:
    return max(1, (os.cpu_count() or 1) // workers)


def _run(
    workers: int,
    opening: tuple[Any, ...],
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    done: Callable[[int, Any], None],
) -> None:
    """Run jobs in processes.

    Args:
        opening: the function that prepares a process, followed by its arguments.
        work: function that does a job in a process.
        jobs: arguments of `work` for each job.
        done: called with each job's index and result.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(jobs)), context, opening[0], opening[1:]) as executor:
        try:
            waiting = {executor.submit(work, *job): place for place, job in enumerate(jobs)}
            for future in as_completed(waiting):
                done(waiting[future], future.result())
        except BrokenProcessPool as error:
            raise UserError(
                f"one of {workers} processes was killed, usually for lack of memory: give fewer --workers; "
                "the same command continues where it stopped"
            ) from error
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            for process in set(multiprocessing.active_children()) - before:
                process.terminate()
            raise


_pipe: Any = None  # the pipeline of this process


def _prepare(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal interrupts all processes; the parent ends the others
    import torch

    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this process when its parent ends, because a killed parent cannot end its processes."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _open(bundle: Path, engine: str, threads: int) -> None:
    global _pipe
    _prepare(threads)
    from ...runtime.pipeline import load

    _pipe = load(bundle, engine=engine, threads=threads)


def _part(task: ImageTask, setting: QualitySetting, first: int, folder: Path) -> int:
    """Generate a part and return the number of its images."""
    return len(pictures.make_part(_pipe, task, setting, first, folder).pictures)
