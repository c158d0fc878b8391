"""The rounds of a latency run: contestants take turns, A B C A B C, in worker processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime.generation.schedule import parse
from ..schema.latency import Contestant, Latency
from ..worker_process import Answer, RequestFailed, WorkerProcess
from .case import Case, Entrant
from .ceiling import DTYPES
from .loop import clock

WORKER = "offcut.benchmarks.latency.worker"
RESERVE = 2**30
"""Bytes of memory that stay free for the rest of the machine."""

NOT_CACHED = "nothing was cached: the latents equal those of the uncached run bit for bit"
REFERENCE = "diffusers eager fp32"


@dataclass(frozen=True)
class RoundOptions:
    """How a run is measured.

    Attributes:
        log: file for the output of the processes.
        rounds: minimum number of rounds.
        duration: minimum duration of all rounds together, in seconds.
        warm_up: number of loops of each contestant before its first measured loop; each ends once all graphs have run.
        alone: number of calls back to back, which give the time of a call alone.
        timeout: seconds that a request to a process may take, with compilation.
        progress: called with a sentence as each turn begins.
    """

    log: Path
    rounds: int = 5
    duration: float = 0.0
    warm_up: int = 1
    alone: int = 5
    timeout: float = 3600.0
    progress: Callable[[str], None] = lambda sentence: None


def measure(case: Case, entrants: Sequence[Entrant], options: RoundOptions, model: str) -> Latency:
    """Measure all contestants in turns.

    The row of a contestant that fails has the reason in place of figures. An interrupt ends the run with the complete
    rounds.

    Raises:
        UserError: the schedule has no shallow call in so few steps, or the common inputs cannot be created.
        KeyboardInterrupt: the interrupt came in the first round.
    """
    run = _Run(case, options, {entrant.name: _row(entrant, case) for entrant in entrants})
    try:
        run.prepare([entrant.precision for entrant in run.running(entrants)])
        rounds, interrupted = run.rounds(entrants)
    finally:
        run.close()
    latency = Latency(
        model=model,
        steps=case.steps,
        height=case.height,
        width=case.width,
        images_per_call=case.images,
        frames=case.frames,
        guidance=case.guidance,
        scheduler=case.scheduler,
        rounds=rounds,
        interrupted=interrupted,
        threads=case.threads,
        clock=clock(case),
        contestants=list(run.rows.values()),
        warm_up=options.warm_up,
        idle_cpu_share=round(run.idle_share, 4),
        work=run.work,
        products=run.products,
        reopened=run.reopened,
    )
    fill_in(latency, run.latents, {entrant.name: entrant.twin for entrant in entrants})
    return latency


def warm_up_calls(case: Case) -> int:
    """Return the number of calls after which a cached loop has run the full and the shallow graph.

    Raises:
        UserError: the loop never runs the shallow graph.
    """
    full = set(parse(case.schedule).full_calls(case.steps))
    shallow = next((call for call in range(case.steps) if call not in full), None)
    if shallow is None:
        raise UserError(f"{case.schedule} makes every one of {case.steps} calls full: give more --steps")
    return shallow + 1


def make_room(processes: dict[str, WorkerProcess], need: int, available: Callable[[], int]) -> list[str]:
    """Close processes until enough memory is free for a new one; return the names of the closed ones.

    The process that was used last is closed first: its next turn is furthest away.

    Args:
        processes: open processes in the order of their last use; closed ones are removed.
        need: bytes of memory that the new process needs.
        available: returns the number of free bytes.
    """
    closed = []
    while processes and available() < need:
        name, process = processes.popitem()
        process.close()
        closed.append(name)
    return closed


def _row(entrant: Entrant, case: Case) -> Contestant:
    return Contestant(
        name=entrant.name,
        family=entrant.family,
        engine=entrant.engine,
        precision=entrant.precision,
        caching=f"{case.schedule}, {case.cut}" if entrant.cached else None,
        settings=dict(entrant.settings),
        not_run=entrant.not_run,
        size_bytes=entrant.size,
    )


@dataclass
class _Run:
    """The state of a run: rows, open processes, and open contestants of each process."""

    case: Case
    options: RoundOptions
    rows: dict[str, Contestant]
    latents: dict[str, Path] = field(default_factory=dict)
    idle_share: float = 0.0
    reopened: int = 0
    work: dict[str, int] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    _processes: dict[str, WorkerProcess] = field(default_factory=dict)
    _opened: dict[str, set[str]] = field(default_factory=dict)
    _closed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._calls = warm_up_calls(self.case)

    def running(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Return the contestants that have not failed."""
        return [entrant for entrant in entrants if self.rows[entrant.name].not_run is None]

    def prepare(self, precisions: Sequence[str]) -> None:
        """Create the common inputs, and time a large matrix product in each precision."""
        self.options.progress("encode the prompt" if self.case.frames is None else "encode the image")
        case = self.case.as_json()
        process = self._start(None)
        task = "the common inputs cannot be created"
        try:
            self.work = process.request("inputs", case=case)["work"]
            for precision in dict.fromkeys(name for name in precisions if name in DTYPES):
                task = f"a matrix product in {precision} failed"
                self.options.progress(f"matrix product in {precision}")
                self.products[precision] = process.request("product", case=case, precision=precision)["flops"]
        except RequestFailed as error:
            raise UserError(f"{task}: {error}; see {self.options.log}") from error
        finally:
            process.close()

    def rounds(self, entrants: Sequence[Entrant]) -> tuple[int, bool]:
        """Run all rounds; return the number of complete rounds, and whether an interrupt ended them."""
        complete, began = 0, time.perf_counter()
        try:
            while self.running(entrants) and (
                complete < self.options.rounds or time.perf_counter() - began < self.options.duration
            ):
                for entrant in self.running(entrants):
                    self.take(entrant, complete + 1)
                complete += 1
        except KeyboardInterrupt:
            if not complete:
                raise
            for row in self.rows.values():
                row.cut_short(complete)
            return complete, True
        return complete, False

    def take(self, entrant: Entrant, number: int) -> None:
        """Run the turn of a contestant in the round with this number."""
        row = self.rows[entrant.name]
        self.options.progress(f"round {number}: {entrant.name}")
        process = self._process(entrant)
        try:
            self._turn(process, entrant, row)
        except RequestFailed as error:
            row.withdraw(f"in round {number}: {error}" if row.loops else str(error))
            self.latents.pop(entrant.name, None)
        if not process.alive:
            self._processes.pop(entrant.process, None)

    def close(self) -> None:
        while self._processes:
            self._processes.popitem()[1].close()

    def _turn(self, process: WorkerProcess, entrant: Entrant, row: Contestant) -> None:
        if entrant.name not in self._opened[entrant.process]:
            self._open_contestant(process, entrant, row)
        waiting = [other for other in self._processes.values() if other is not process]
        before, began = sum(other.cpu_seconds() for other in waiting), time.perf_counter()
        answer = process.request("loop", name=entrant.name, calls=self._calls if entrant.cached else 1)
        used = sum(other.cpu_seconds() for other in waiting) - before
        self.idle_share = max(self.idle_share, used / (time.perf_counter() - began))
        first = not row.loops
        row.loops.append(answer["loop"])
        row.full += answer["full"]
        row.shallow += answer["shallow"]
        row.full_calls, row.shallow_calls = len(answer["full"]), len(answer["shallow"])
        self.latents[entrant.name] = Path(answer["latents"])
        _note_memory(row, answer)
        if first and self.options.alone:
            answer = process.request("alone", name=entrant.name, repeats=self.options.alone)
            row.full_alone, row.shallow_alone = answer.get("full", []), answer.get("shallow", [])
            row.forecast_alone = answer.get("forecast", [])

    def _open_contestant(self, process: WorkerProcess, entrant: Entrant, row: Contestant) -> None:
        case, contestant, warm_up = self.case.as_json(), entrant.as_json(), self.options.warm_up
        answer = process.request("open", case=case, entrant=contestant, calls=self._calls, warm_up=warm_up)
        self._opened[entrant.process].add(entrant.name)
        if row.load_seconds is None:
            row.load_seconds, row.warm_up_seconds = answer["load"], answer["warm_up"]
        if entrant.python is not None:
            installed = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
            row.settings["environment"] = f"another: {installed}"
        _note_memory(row, answer)

    def _process(self, entrant: Entrant) -> WorkerProcess:
        """Return the contestant's process, open; other processes are closed first if memory is short."""
        name = entrant.process
        if name not in self._processes:
            self._closed.update(make_room(self._processes, entrant.need, self._available))
            self.reopened += name in self._closed
            self._closed.discard(name)
            self._processes[name], self._opened[name] = self._start(entrant.python), set()
        self._processes[name] = self._processes.pop(name)  # the dictionary has the order of the last use
        return self._processes[name]

    def _available(self) -> int:
        import psutil

        # The system counts mapped files as available memory, but waiting contestants will read their files again.
        mapped = sum(process.mapped_bytes() for process in self._processes.values())
        return int(psutil.virtual_memory().available) - mapped - RESERVE

    def _start(self, python: str | None) -> WorkerProcess:
        options = self.options
        return WorkerProcess(WORKER, options.log, options.timeout, python=python, threads=self.case.threads)


def _note_memory(row: Contestant, answer: Answer) -> None:
    row.host_peak_bytes = max(row.host_peak_bytes or 0, answer["host_peak"] or 0)
    if answer["device"] is not None:
        row.device_peak_bytes = max(row.device_peak_bytes or 0, answer["device"])


def fill_in(latency: Latency, latents: Mapping[str, Path], twins: Mapping[str, str | None]) -> None:
    """Add the differences between latents to the rows, and withdraw cached contestants that did not cache.

    Args:
        latency: the result, whose rows are changed.
        latents: safetensors file with the final latents of each measured contestant, by name.
        twins: name of the uncached contestant in the same process, by the name of the cached one.
    """
    from safetensors.torch import load_file

    tensors = {name: load_file(path)["latents"] for name, path in latents.items()}
    rows = {row.name: row for row in latency.contestants}
    for name, twin in twins.items():
        if name in tensors and twin in tensors and tensors[name].equal(tensors[twin]):
            rows[name].withdraw(NOT_CACHED)
    latency.reference = _reference(latency, tensors)
    if latency.reference is not None:
        for name, tensor in tensors.items():
            rows[name].difference = relative_difference(tensor, tensors[latency.reference])


def relative_difference(ours: Any, theirs: Any) -> float:
    """Return the norm of the difference divided by the norm of ``theirs``; infinite if a value is not finite."""
    difference = float((ours.double() - theirs.double()).norm() / theirs.double().norm())
    return difference if difference == difference else float("inf")


def _reference(latency: Latency, tensors: Mapping[str, Any]) -> str | None:
    """Return the name of eager fp32, or of the first uncached contestant, in fp32 if there is one."""
    uncached = [row for row in latency.contestants if row.caching is None and row.name in tensors]
    exact = [row.name for row in uncached if row.precision == "fp32"]
    eager = [REFERENCE] if REFERENCE in tensors else []
    return next(iter([*eager, *exact, *(row.name for row in uncached)]), None)
