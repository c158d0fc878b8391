"""TensorRT's progress monitor, told as sentences."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

_QUARTERS = 4
_LONG = 8
"""Phases with fewer steps than this are announced once if they are near the root of the tree, else not at all."""


class Phases:
    """What the build is doing: a sentence as a phase begins, and at each quarter of a long one.

    TensorRT calls from several threads. A ``say`` that raises, or a Ctrl-C meanwhile, stops the build: ``failure``
    keeps it to be raised afterwards, since no exception may pass through TensorRT.

    Args:
        what: is being built, e.g. ``"full"``.
    """

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self._what = what
        self._say = say
        self._lock = Lock()
        self._depth: dict[str, int] = {}
        self._steps: dict[str, int] = {}
        self.failure: BaseException | None = None

    def start(self, phase: str, parent: str | None, steps: int) -> None:
        """Note that a phase begins, inside another or on its own."""
        self._keep_failure(self._start, phase, parent, steps)

    def step(self, phase: str, done: int) -> bool:
        """Note a finished step, counted from 0; gives whether to go on."""
        self._keep_failure(self._step, phase, done)
        return self.failure is None

    def finish(self, phase: str) -> None:
        """Note that a phase is over."""
        self._keep_failure(self._finish, phase)

    def _start(self, phase: str, parent: str | None, steps: int) -> None:
        depth = self._depth.get(parent or "", -1) + 1
        self._depth[phase], self._steps[phase] = depth, steps
        if depth <= 1 or steps >= _LONG:
            self._tell(phase)

    def _step(self, phase: str, done: int) -> None:
        steps = self._steps.get(phase, 0)
        if steps >= _LONG:
            before, quarter = (count * _QUARTERS // steps for count in (done, done + 1))
            if before < quarter < _QUARTERS:
                self._tell(f"{phase}, {100 * quarter // _QUARTERS} %")

    def _finish(self, phase: str) -> None:
        self._depth.pop(phase, None)
        self._steps.pop(phase, None)

    def _tell(self, sentence: str) -> None:
        if self.failure is None:
            self._say(f"  {self._what}: {sentence[0].lower()}{sentence[1:]}")

    def _keep_failure(self, note: Callable[..., None], *arguments: object) -> None:
        try:
            with self._lock:
                note(*arguments)
        except BaseException as error:  # raised again by the build
            self.failure = self.failure or error


def monitor(trt: Any, phases: Phases) -> Any:
    """An ``IProgressMonitor`` that tells ``phases``."""

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
