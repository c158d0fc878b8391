"""The run: contestants take turns, A B C, A B C, each in the process of its house; a row for each at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...runtime.generation.schedule import parse
from .case import Case, Entrant
from .ceiling import DTYPES
from .house import Answer, Process, to_close
from .loop import clock
from .ratios import fill_in
from .record import Contestant, Latency

RESERVE = 2**30
"""Bytes of memory that are left to the rest of the machine."""


@dataclass(frozen=True)
class Options:
    """How a run is made.

    Attributes:
        rounds: at least so many.
        duration: go on with rounds for at least so many seconds.
        warm_up: loops of each contestant before its first measured one, cut short once its graphs have run.
        alone: calls back to back, for a call's time alone.
        products: also time a large matrix product in each precision, as the limit of the calls.
        timeout: seconds that one answer of a process may take, compilation included.
        log: file for what the processes print.
        progress: called with a sentence as each turn begins.
    """

    log: Path
    rounds: int = 5
    duration: float = 0.0
    warm_up: int = 1
    alone: int = 5
    products: bool = True
    timeout: float = 3600.0
    progress: Callable[[str], None] = lambda sentence: None


def measure(case: Case, entrants: Sequence[Entrant], options: Options, model: str) -> Latency:
    """Run all contestants in turn.

    A contestant that fails keeps its row, with the reason in place of figures. An interrupt ends the run after the
    rounds that are complete.

    Raises:
        UserError: the schedule leaves no shallow call in so few steps, or the common inputs cannot be made.
        KeyboardInterrupt: in the first round.
    """
    run = _Run(case, options, {entrant.name: _row(entrant, case) for entrant in entrants})
    try:
        run.prepare([entrant.precision for entrant in run.running(entrants)] if options.products else [])
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


def turns(entrants: Sequence[Entrant]) -> Iterator[list[Entrant]]:
    """The turns of one round: each begins with who has it, followed by the others up to the end of the next round."""
    order = [*entrants, *entrants]
    for index in range(len(entrants)):
        yield order[index:]


def warm_up_calls(case: Case) -> int:
    """After how many calls a cached loop has run both graphs.

    Raises:
        UserError: it never runs the shallow one.
    """
    full = set(parse(case.schedule).full_calls(case.steps))
    shallow = next((call for call in range(case.steps) if call not in full), None)
    if shallow is None:
        raise UserError(f"{case.schedule} makes every one of {case.steps} calls full: give more --steps")
    return shallow + 1


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
    """What goes on during a run."""

    case: Case
    options: Options
    rows: dict[str, Contestant]
    latents: dict[str, Path] = field(default_factory=dict)
    idle_share: float = 0.0
    reopened: int = 0
    work: dict[str, int] = field(default_factory=dict)
    products: dict[str, float] = field(default_factory=dict)
    _open: dict[str, Process] = field(default_factory=dict)
    _needs: dict[str, int] = field(default_factory=dict)
    _closed: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._calls = warm_up_calls(self.case)

    def running(self, entrants: Sequence[Entrant]) -> list[Entrant]:
        """Those that have not failed."""
        return [entrant for entrant in entrants if self.rows[entrant.name].not_run is None]

    def prepare(self, precisions: Sequence[str]) -> None:
        """Make what all loops begin with, and time a large matrix product in each of these precisions."""
        self.options.progress("encode the prompt" if self.case.frames is None else "encode the image")
        case = self.case.as_json()
        process = self._start(None)
        try:
            made = self._asked(process, "what all loops begin with cannot be made", "inputs", case=case)
            self.work = made["work"]
            for precision in dict.fromkeys(each for each in precisions if each in DTYPES):
                self.options.progress(f"matrix product in {precision}")
                why = f"a matrix product in {precision} failed"
                self.products[precision] = self._asked(process, why, "product", case=case, precision=precision)["flops"]
        finally:
            process.close()

    def _asked(self, process: Process, why: str, do: str, **arguments: Any) -> Answer:
        answer = process.ask(do, **arguments)
        if "error" in answer:
            raise UserError(f"{why}: {answer['error']}; see {self.options.log}")
        return answer

    def rounds(self, entrants: Sequence[Entrant]) -> tuple[int, bool]:
        """Run them all; how many are complete, and whether an interrupt came before the last."""
        done, began = 0, time.perf_counter()
        try:
            while self.running(entrants) and (
                done < self.options.rounds or time.perf_counter() - began < self.options.duration
            ):
                for coming in turns(self.running(entrants)):
                    self.take(coming, done + 1)
                done += 1
        except KeyboardInterrupt:
            if not done:
                raise
            for row in self.rows.values():
                row.cut_short(done)
            return done, True
        return done, False

    def take(self, coming: Sequence[Entrant], number: int) -> None:
        """The turn of the first of these, in this round."""
        entrant = coming[0]
        row = self.rows[entrant.name]
        if row.not_run is not None:  # it failed in this round
            return
        self.options.progress(f"round {number}: {entrant.name}")
        process = self._house(entrant, [other.house for other in coming[1:]])
        answer = self._turn(process, entrant, row)
        if "error" in answer:
            where = "" if not row.loops else f"in round {number}: "
            row.withdraw(where + answer["error"])
            self.latents.pop(entrant.name, None)
        if not process.alive:
            self._open.pop(entrant.house, None)

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()

    def _turn(self, process: Process, entrant: Entrant, row: Contestant) -> Answer:
        if entrant.name not in process.opened:
            answer = self._open_contestant(process, entrant, row)
            if "error" in answer:
                return answer
        waiting = [other for other in self._open.values() if other is not process]
        before, began = sum(other.cpu_seconds() for other in waiting), time.perf_counter()
        answer = process.ask("loop", name=entrant.name, calls=self._calls if entrant.cached else 1)
        if "error" in answer:
            return answer
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
            answer = process.ask("alone", name=entrant.name, repeats=self.options.alone)
            if "error" in answer:
                return answer
            row.full_alone, row.shallow_alone = answer.get("full", []), answer.get("shallow", [])
            row.forecast_alone = answer.get("forecast", [])
        if self.case.end_to_end:
            answer = process.ask("image", name=entrant.name)
            if "error" in answer:
                return answer
            row.images.append(answer["image"])
            _note_memory(row, answer)
        self._needs[entrant.house] = row.host_peak_bytes or 0
        return answer

    def _open_contestant(self, process: Process, entrant: Entrant, row: Contestant) -> Answer:
        answer = process.ask(
            "open",
            case=self.case.as_json(),
            entrant=entrant.as_json(),
            calls=self._calls,
            warm_up=self.options.warm_up,
        )
        if "error" not in answer:
            process.opened.add(entrant.name)
            if row.load_seconds is None:
                row.load_seconds, row.warm_up_seconds = answer["load"], answer["warm_up"]
            if entrant.python is not None:
                installed = ", ".join(f"{name} {version}" for name, version in answer["versions"].items())
                row.settings["environment"] = f"another: {installed}"
            _note_memory(row, answer)
        return answer

    def _house(self, entrant: Entrant, following: Sequence[str]) -> Process:
        """The open process of this contestant; others are closed first if memory is short."""
        import psutil

        if entrant.house not in self._open:
            need = self._needs.get(entrant.house, entrant.need) + RESERVE
            resident = {house: process.resident() for house, process in self._open.items()}
            # The system counts what is mapped from files as available; to who is to run again soon it is not.
            available = psutil.virtual_memory().available - sum(other.mapped() for other in self._open.values())
            for house in to_close(resident, following, need, available):
                self._open.pop(house).close()
                self._closed.add(house)
            self.reopened += entrant.house in self._closed
            self._closed.discard(entrant.house)
            self._open[entrant.house] = self._start(entrant.python)
        return self._open[entrant.house]

    def _start(self, python: str | None) -> Process:
        return Process(python, self.case.threads, self.options.log, self.options.timeout)


def _note_memory(row: Contestant, answer: Mapping[str, int | None]) -> None:
    row.host_peak_bytes = max(row.host_peak_bytes or 0, answer["host_peak"] or 0)
    if answer["device"] is not None:
        row.device_peak_bytes = max(row.device_peak_bytes or 0, answer["device"])
