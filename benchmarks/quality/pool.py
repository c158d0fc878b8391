"""Several processes make a run's pictures, each with the engines open for itself, and judge the parts that they left.

A small model gains more from pictures side by side than from threads inside one call.
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
from ..shapes.judge_net.reader import JudgeNet
from . import pictures, scores
from .pictures import ImageTask, Progress, missing_parts
from .plan import QualitySetting, reference
from .scores import Scored


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
    """Make every part that `folder` lacks, as `pictures.make` does one after the other.

    Args:
        bundle: its directory.
        workers: processes.
        threads: of each; the cores divided among them by default.
        on_call: told of a part's UNet calls once it is there.

    Raises:
        UserError: `folder` cannot be written, or a process was killed, for want of memory as a rule.
    """
    jobs = [(task, setting, first, folder) for setting in settings for first in missing_parts(task, setting, folder)]
    _spread(
        workers,
        (_open, bundle, engine, _share(workers, threads)),
        _part,
        jobs,
        lambda place, made: on_call(made * jobs[place][1].steps),
    )


def score(
    task: ImageTask,
    settings: Sequence[QualitySetting],
    folder: Path,
    *,
    workers: int,
    threads: int | None = None,
    done: Callable[[QualitySetting], None] = lambda setting: None,
) -> dict[QualitySetting, Scored]:
    """Judge every setting's pictures, which all lie in `folder`; see `scores.score`.

    Args:
        workers, threads: as of `make`.
        done: told of each setting once it is judged.

    Raises:
        UserError: a process was killed, for want of memory as a rule.
    """
    jobs = [(task, setting, reference(setting, settings), folder) for setting in settings]
    scored: dict[QualitySetting, Scored] = {}

    def judged(place: int, made: Scored) -> None:
        scored[settings[place]] = made
        done(settings[place])

    _spread(workers, (_judge, _share(workers, threads)), _scored, jobs, judged)
    return {setting: scored[setting] for setting in settings}


def _share(workers: int, threads: int | None) -> int:
    return threads or max(1, (os.cpu_count() or 1) // workers)


def _spread(
    workers: int,
    begin: tuple[Any, ...],
    work: Callable[..., Any],
    jobs: Sequence[tuple[Any, ...]],
    done: Callable[[int, Any], None],
) -> None:
    """Have processes work at jobs side by side.

    Args:
        begin: what makes a process ready, and its arguments.
        jobs: of each the arguments.
        done: told of each job's place, and of what came of it.
    """
    if not jobs:
        return
    ready, *given = begin
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(min(workers, len(jobs)), multiprocessing.get_context("spawn"), ready, tuple(given))
    with pool:
        try:
            waiting = {pool.submit(work, *job): place for place, job in enumerate(jobs)}
            for each in as_completed(waiting):
                done(waiting[each], each.result())
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


_pipe: Any = None  # of this process, when it makes pictures
_net: JudgeNet | None = None  # of this process, when it judges them


def _settle(threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's reaches all of them; the first process ends the rest
    import torch

    from ...runtime.quiet import quiet_libraries

    quiet_libraries()
    torch.set_num_threads(threads)
    threading.Thread(target=_end_with_first, daemon=True).start()


def _end_with_first() -> None:
    """A first process that is killed tells nobody, and the others would wait for its next job forever."""
    first = multiprocessing.parent_process()
    assert first is not None
    first.join()
    os._exit(1)


def _open(bundle: Path, engine: str, threads: int) -> None:
    global _pipe
    _settle(threads)
    from ...runtime.pipeline import load

    _pipe = load(bundle, engine=engine, threads=threads)


def _part(task: ImageTask, setting: QualitySetting, first: int, folder: Path) -> int:
    """How many pictures the part has, once it lies in `folder`."""
    return len(pictures.make_part(_pipe, task, setting, first, folder).pictures)


def _judge(threads: int) -> None:
    global _net
    _settle(threads)
    _net = JudgeNet.load()


def _scored(task: ImageTask, setting: QualitySetting, base: QualitySetting, folder: Path) -> Scored:
    assert _net is not None
    own, other = (pictures.make(None, task, each, folder) for each in (setting, base))
    return scores.score(_net, task, own, other)
