"""A worker that batches whole requests, as other servers do: a baseline behind the same HTTP server."""

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

_VARYING = ("prompt", "negative_prompt", "generator")
"""Names of the arguments in which the requests of a batch may differ."""


class WholeRequests:
    """A worker that runs a batch of requests as one pipeline call, from the first step to the last.

    An idle worker takes up to ``max_batch`` waiting requests with equal sizes, steps, guidance and schedule, oldest
    first. Later requests wait until the batch is done. The rows of a client that disconnects stay in the batch.
    Deadlines are ignored.

    Args:
        inner: worker that runs each batch as one request; ``close`` closes it too.
        max_batch: maximum number of requests in a batch.
        max_queue: maximum number of waiting requests.
    """

    def __init__(self, inner: Worker, max_batch: int, max_queue: int) -> None:
        self._inner, self._max_batch, self._max_queue = inner, max_batch, max_queue
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
        """Queue a request like ``Worker.submit``; the deadline is ignored.

        Raises:
            QueueFullError: the queue is full.
            WorkerClosedError: the worker is draining or closed.
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
        """Raise the errors of ``submit`` if the worker accepts no request now, like ``Worker.expect_room``."""
        with self._changed:
            self._check()

    def _check(self) -> None:
        if self._closing:
            raise WorkerClosedError("this worker takes no more requests: send them to another one")
        if len(self._queue) >= self._max_queue + self._max_batch - len(self._running):
            raise QueueFullError(f"{len(self._queue)} requests wait already: try again later")

    @property
    def healthy(self) -> bool:
        """Whether the inner worker is healthy."""
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
            waiting = request in self._queue
            if waiting:
                self._queue.remove(request)
                self._changed.notify_all()
        if waiting:
            self._end(request, None, RequestCancelledError("the request was cancelled"))

    def _work(self) -> None:
        while batch := self._next():
            images: list[Any] = []
            error: BaseException | None = None
            try:
                images = self._generate(batch)
            except BaseException as raised:  # every request gets the error
                error = raised
            count = len(images) // len(batch)
            with self._changed:
                self._running = []
                self._changed.notify_all()
            for index, request in enumerate(batch):
                self._end(request, SimpleNamespace(images=images[index * count : (index + 1) * count]), error)

    def _next(self) -> list[WorkerRequest]:
        """Wait for the next batch and return it; the batch is empty once the worker is closed."""
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            if not self._queue:
                return []
            batch = [request for request in self._queue if _compatible(request, self._queue[0])][: self._max_batch]
            self._queue = [request for request in self._queue if request not in batch]
            for request in batch:
                request.future.set_running_or_notify_cancel()
                request.started = time.monotonic()
                self._queue_waits = self._queue_waits.plus(request.started - request.submitted)
            self._running = batch
            return batch

    def _generate(self, batch: list[WorkerRequest]) -> list[Any]:
        def on_step(step: Step) -> None:
            for request in batch:
                if request.on_step is not None:
                    request.on_step(step)

        first = batch[0]
        lists = {name: [request.arguments[name] for request in batch] for name in _VARYING if name in first.arguments}
        if "generator" in lists:  # each request has a list of generators
            lists["generator"] = [generator for generators in lists["generator"] for generator in generators]
        ticket = self._inner.submit(
            {**first.arguments, **lists},
            schedule=first.schedule,
            cut=first.cut,
            forecast=first.forecast,
            on_step=on_step,
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


def _compatible(one: WorkerRequest, other: WorkerRequest) -> bool:
    """Return whether one pipeline call can generate the images of both requests."""

    def key(request: WorkerRequest) -> tuple[Any, ...]:
        shared = {name: value for name, value in request.arguments.items() if name not in _VARYING}
        return shared, set(request.arguments) & set(_VARYING), request.schedule, request.cut, request.forecast

    return key(one) == key(other)
