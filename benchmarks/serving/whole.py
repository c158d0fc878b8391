"""Batches of whole requests, as servers make them that know nothing of steps: a baseline, behind the same HTTP."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...errors import QueueFullError, RequestCancelledError, WorkerClosedError
from ...runtime.batching import Statistics, Ticket, Total, Worker
from ...runtime.batching.request import OnStep, Step, WorkerRequest
from ...runtime.batching.worker import HORIZON, outcome_of

if TYPE_CHECKING:
    from ...runtime.generation.forecast import Forecast
    from ...runtime.generation.schedule import Schedule

_OF_EACH = ("prompt", "negative_prompt", "generator")
"""Arguments that requests of one batch may have of their own."""


class WholeRequests:
    """A worker that runs requests as one pipeline call, from the first step to the last.

    When it is idle it takes those that wait and ask for the same sizes, steps, guidance and schedule, first come first
    served, up to ``most``; who comes later waits until they are done. A client that goes away does not free its rows,
    and deadlines are not kept.

    Args:
        inner: runs a batch as one request; closed with this.
        most: requests of a batch.
        max_queue: requests that wait beside them.
    """

    def __init__(self, inner: Worker, most: int, max_queue: int) -> None:
        self._inner, self._most, self._max_queue = inner, most, max_queue
        self._changed = threading.Condition()
        self._keys = itertools.count()
        self._queue: list[WorkerRequest] = []
        self._running: list[WorkerRequest] = []
        self._closing = False
        self._queue_waits = Total()
        self._ended: dict[str, Total] = {}
        self._thread = threading.Thread(target=self._work, name="whole-requests", daemon=True)
        self._thread.start()

    def submit(
        self,
        arguments: Mapping[str, Any],
        *,
        schedule: Schedule | None = None,
        cut: str | None = None,
        forecast: Forecast | None = None,
        deadline: float | None = None,
        on_step: OnStep | None = None,
    ) -> Ticket:
        """As ``Worker.submit``; the deadline is not kept.

        Raises:
            QueueFullError: as many wait as may.
            WorkerClosedError: it is draining or closed.
        """
        now = time.monotonic()
        request = WorkerRequest(
            key=next(self._keys),
            arguments=arguments,
            schedule=schedule,
            cut=cut,
            forecast=forecast,
            scheduler=None,
            pipeline=None,
            submitted=now,
            expires=None,
            due=now + HORIZON,
            on_step=on_step,
        )
        with self._changed:
            self._check()
            self._queue.append(request)
            self._changed.notify_all()
        return Ticket(request, self._cancel)

    def expect_room(self) -> None:
        """As ``Worker.expect_room``."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._closing:
            raise WorkerClosedError("this worker takes no more requests: send them to another one")
        if len(self._queue) >= self._max_queue + self._most - len(self._running):
            raise QueueFullError(f"{len(self._queue)} requests wait already: try again later")

    @property
    def healthy(self) -> bool:
        return self._inner.healthy

    @property
    def fault(self) -> str | None:
        return self._inner.fault

    def statistics(self) -> Statistics:
        counted = self._inner.statistics()
        with self._changed:
            return replace(
                counted,
                queued=len(self._queue),
                in_flight=len(self._running),
                queue_waits=self._queue_waits,
                requests=dict(self._ended),
            )

    def drain(self, timeout: float | None = None) -> bool:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            return self._changed.wait_for(lambda: not self._queue and not self._running, timeout)

    def close(self) -> None:
        self.drain()
        self._thread.join()
        self._inner.close()

    def _cancel(self, request: WorkerRequest) -> None:
        with self._changed:
            waits = request in self._queue
            if waits:
                self._queue.remove(request)
                self._changed.notify_all()
        if waits:
            self._end(request, None, RequestCancelledError("the request was cancelled"))

    def _work(self) -> None:
        while batch := self._next():
            images: list[Any] = []
            error: BaseException | None = None
            try:
                images = self._draw(batch)
            except BaseException as raised:  # the senders get it
                error = raised
            each = len(images) // len(batch)
            with self._changed:
                self._running = []
                self._changed.notify_all()
            for place, request in enumerate(batch):
                self._end(request, SimpleNamespace(images=images[place * each : (place + 1) * each]), error)

    def _next(self) -> list[WorkerRequest]:
        """Those that make the next batch; empty at the end."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return []
            batch = [each for each in self._queue if _together(each, self._queue[0])][: self._most]
            self._queue = [each for each in self._queue if each not in batch]
            for request in batch:
                request.future.set_running_or_notify_cancel()
                request.started = time.monotonic()
                self._queue_waits = self._queue_waits.plus(request.started - request.submitted)
            self._running = batch
            return batch

    def _draw(self, batch: list[WorkerRequest]) -> list[Any]:
        def step(made: Step) -> None:
            for request in batch:
                if request.on_step is not None:
                    request.on_step(made)

        first = batch[0]
        own = {name: [each.arguments[name] for each in batch] for name in _OF_EACH if name in first.arguments}
        if "generator" in own:  # a list for each request
            own["generator"] = [each for of_request in own["generator"] for each in of_request]
        ticket = self._inner.submit(
            {**first.arguments, **own},
            schedule=first.schedule,
            cut=first.cut,
            forecast=first.forecast,
            on_step=step,
        )
        return list(ticket.future.result().images)

    def _end(self, request: WorkerRequest, output: Any, error: BaseException | None) -> None:
        with self._changed:
            outcome = outcome_of(error)
            self._ended[outcome] = self._ended.get(outcome, Total()).plus(time.monotonic() - request.submitted)
        if error is None:
            request.future.set_result(output)
        else:
            request.future.set_exception(error)


def _together(one: WorkerRequest, other: WorkerRequest) -> bool:
    """Whether one pipeline call can draw both."""
    shared = [{name: value for name, value in each.arguments.items() if name not in _OF_EACH} for each in (one, other)]
    named = [set(each.arguments) & set(_OF_EACH) for each in (one, other)]
    settings = [(each.schedule, each.cut, each.forecast) for each in (one, other)]
    return shared[0] == shared[1] and named[0] == named[1] and settings[0] == settings[1]
