"""TensorRT's build progress as sentences."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

_QUARTERS = 4
_LONG = 8
"""Phases with fewer steps are announced once if they are near the root of the tree of phases, else not at all."""


class BuildPhases:
    """Reports a build: a sentence as a phase begins, and at each quarter of a long phase.

    TensorRT calls this from several threads. If ``progress`` raises, or Ctrl-C is pressed, the build stops. No
    exception may pass through TensorRT, so ``failure`` holds the exception, to be raised after the build.

    Args:
        graph: name of the graph that is built, e.g. ``"full"``.
        progress: called with each sentence.
    """

    def __init__(self, graph: str, progress: Callable[[str], None]) -> None:
        self._graph = graph
        self._progress = progress
        self._lock = Lock()
        self._depth: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self.failure: BaseException | None = None

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Record that a phase begins, inside another phase or at the root."""
        self._guard(self._start, phase, parent, steps)

    def step(self, phase: str, done: int) -> bool:
        """Record a finished step, counted from 0; return whether the build may go on."""
        self._guard(self._step, phase, done)
        return self.failure is None

    def finish(self, phase: str) -> None:
        """Record that a phase has ended."""
        self._guard(self._finish, phase)

    def _start(self, phase: str, parent: str | None, steps: int) -> None:
        depth = self._depth.get(parent or "", -1) + 1
        self._depth[phase], self._steps[phase] = depth, steps
        if depth <= 1 or steps >= _LONG:
            self._report(phase)

    def _step(self, phase: str, done: int) -> None:
        steps = self._steps.get(phase, 0)
        if steps >= _LONG:
            before, quarter = (count * _QUARTERS // steps for count in (done, done + 1))
            if before < quarter < _QUARTERS:
                self._report(f"{phase}, {100 * quarter // _QUARTERS} %")

    def _finish(self, phase: str) -> None:
        self._depth.pop(phase, None)
        self._steps.pop(phase, None)

    def _report(self, sentence: str) -> None:
        if self.failure is None:
            self._progress(f"  {self._graph}: {sentence[0].lower()}{sentence[1:]}")

    def _guard(self, record: Callable[..., None], *arguments: object) -> None:
        try:
            with self._lock:
                record(*arguments)
        except BaseException as error:  # the build raises it
            self.failure = self.failure or error


def monitor(trt: Any, phases: BuildPhases) -> Any:
    """Return an ``IProgressMonitor`` that reports to ``phases``."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            return phases.step(phase_name, step)

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()
