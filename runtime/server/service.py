"""What the routes of a server share: the worker, its drawings, and whether it is ready."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from ...errors import EngineFaultError, InternalError, LimitError, UserError, WorkerClosedError
from ..batching import Statistics, Worker
from .caching import caching
from .drawing import Drawing
from .metrics import Metrics
from .problems import FAULT, INTERNAL, Problem, problem_of
from .schemas import GenerationRequest
from .served import Served
from .settings import Settings
from .wanted import wanted

log = logging.getLogger("offcut.server")

_LOOK = 0.1
"""Seconds between looks at the worker."""

_TELLING = 5.0
"""Seconds that clients have to read an error before the server ends."""


class Service:
    """A worker as a server offers it.

    Args:
        worker: runs ``served``'s pipeline; the caller closes it.
        served: the model.
        settings: of the server.

    Raises:
        UserError: the limits allow no image of the model's own size, or its schedule does not fit.
    """

    def __init__(self, worker: Worker, served: Served, settings: Settings) -> None:
        (width, height), limits = served.size, settings.limits
        if width * height > limits.pixels or width * height * settings.steps > limits.pixel_steps:
            raise UserError(
                f"the limits allow no image of this model's own size, {width}x{height} in {settings.steps} steps: "
                "raise --max-pixels and --max-pixel-steps, or lower --steps"
            )
        if settings.schedule is not None or settings.forecast:
            try:
                caching(GenerationRequest(prompt="a"), served, settings, settings.steps, settings.guidance)
            except LimitError as error:
                raise UserError(f"the server's own schedule does not fit its own requests: {error}") from error
        self.worker, self.served, self.settings = worker, served, settings
        self.metrics = Metrics(worker)
        self.started = int(time.time())
        self.stopping = False
        """Whether nothing more is taken; may be set from a signal handler."""
        self._open: set[Drawing] = set()
        self._stuck: str | None = None
        self._mark: tuple[int, ...] = ()
        self._moved = time.monotonic()

    @property
    def fault(self) -> str | None:
        """Why the engines are of no use; None while they work."""
        return self._stuck or self.worker.fault

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.stopping and self.fault is None

    def draw(self, body: GenerationRequest) -> Drawing:
        """Ask for what a body says; a place in the worker is reserved before any work.

        Raises:
            RequestError: it asks for too much, or there is no room.
            EngineFaultError: the engines do not work.
        """
        if self._stuck is not None:
            raise EngineFaultError(self._stuck)
        if self.stopping:
            raise WorkerClosedError("the server is shutting down")
        asked = wanted(body, self.served, self.settings, self.worker.statistics().cache_limit)
        began = time.monotonic()

        def closed(drawing: Drawing) -> None:
            self._open.discard(drawing)
            self.metrics.request_seconds.labels(drawing.outcome).observe(time.monotonic() - began)

        drawing = Drawing(self.worker, asked, self.metrics, closed)
        self._open.add(drawing)
        return drawing

    def problem(self, error: BaseException) -> Problem:
        """What to tell a client of an error, which is counted, and logged where it is the server's own."""
        told = problem_of(error, self.worker.statistics())
        if told is INTERNAL:
            log.error("a request failed", exc_info=error)
        elif told is FAULT:
            log.error("an engine failed: %s", error)
        self.refused(told)
        return told

    def refused(self, problem: Problem) -> None:
        """Count it."""
        self.metrics.rejections.labels(problem.code).inc()

    async def watch(self, leave: Callable[[], None]) -> None:
        """Look after the worker until the server should end, and then say so once.

        A signal lets the requests in flight finish. A fault gives them an error, and lets readiness be seen as 503
        for a while.
        """
        stopped: float | None = None
        while True:
            await asyncio.sleep(_LOOK)
            now = time.monotonic()
            self._look_for_progress(now)
            if self.fault is not None:
                self._fail_all(EngineFaultError(self.fault))
                await asyncio.sleep(self.settings.linger)
                break
            if not self.stopping:
                continue
            if stopped is None:
                stopped = now
                self.worker.drain(0)
            if self._idle():
                break
            if now - stopped > self.settings.drain:
                self._fail_all(WorkerClosedError("the server was shut down before the request was done"))
                log.warning("requests in flight were given up %g s after the signal", self.settings.drain)
                await self._told()
                break
        leave()

    async def _told(self) -> None:
        """Wait until every client has its answer, within reason."""
        deadline = time.monotonic() + _TELLING
        while self._open and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK)

    def _idle(self) -> bool:
        counted = self.worker.statistics()
        return not (self._open or counted.queued or counted.in_flight)

    def _fail_all(self, error: UserError | InternalError) -> None:
        for drawing in self._open:
            drawing.fail(type(error)(str(error)))

    def _look_for_progress(self, now: float) -> None:
        """An engine that neither returns nor fails is as good as failed."""
        counted = self.worker.statistics()
        mark = _progress(counted)
        if mark != self._mark or not counted.in_flight:
            self._mark, self._moved = mark, now
        elif now - self._moved > self.settings.stall and self._stuck is None:
            self._stuck = f"nothing has moved for {self.settings.stall:g} s although requests are in flight"


def _progress(counted: Statistics) -> tuple[int, ...]:
    calls = sum(total.count for total in counted.ticks.values())
    return calls, counted.queue_waits.count, sum(total.count for total in counted.requests.values())
