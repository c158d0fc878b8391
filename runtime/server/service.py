"""One worker as a server offers it: its drawings, and whether it is ready."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from ...errors import EngineFaultError, InternalError, LimitError, UserError, WorkerClosedError
from ..batching import Statistics, Worker
from .caching import caching
from .drawing import Drawing
from .metrics import Metrics
from .model import Model
from .offer import Offer, log
from .schemas import GenerationRequest
from .served import Served
from .settings import Settings
from .wanted import wanted

_LOOK = 0.1
"""Seconds between looks at the worker."""

_TELLING = 5.0
"""Seconds that clients have to read an error before the server ends."""


class Service(Offer):
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
        super().__init__(settings, Metrics(lambda: {(): worker.statistics()}))
        self.worker, self.served = worker, served
        self._cache_limit = worker.statistics().cache_limit
        self._open: set[Drawing] = set()
        self._stuck: str | None = None
        self._mark: tuple[int, ...] = ()
        self._moved = time.monotonic()

    @property
    def models(self) -> Mapping[str, Model]:
        return {self.served.name: self.served}

    @property
    def fault(self) -> str | None:
        return self._stuck or self.worker.fault

    def statistics(self) -> Statistics:
        return self.worker.statistics()

    def draw(self, body: GenerationRequest) -> Drawing:
        if self._stuck is not None:
            raise EngineFaultError(self._stuck)
        if self.stopping:
            raise WorkerClosedError("the server is shutting down")
        self.worker.expect_room()
        asked = wanted(body, self.served, self.settings, self._cache_limit)
        began = time.monotonic()

        def closed(drawing: Drawing) -> None:
            self._open.discard(drawing)
            self.metrics.request_seconds.labels(drawing.outcome).observe(time.monotonic() - began)

        drawing = Drawing(self.worker, asked, self.metrics, closed)
        self._open.add(drawing)
        return drawing

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
