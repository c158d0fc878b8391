"""``Worker``: runs many requests at once on one pair of engines. The requests share engine calls step by step."""

from __future__ import annotations

import heapq
import itertools
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from ...errors import (
    DeadlineError,
    EngineFaultError,
    QueueFullError,
    RequestCancelledError,
    RequestError,
    UserError,
    WorkerClosedError,
)
from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from ..pipeline import load
from ..unet import UNet
from .batcher import Batcher, copy_of
from .lanes import Lanes
from .policy import Policy
from .pool import SlotPool
from .request import OnStep, Ticket, WorkerRequest
from .runner import RequestRunner
from .statistics import Statistics, Total

HORIZON = 60.0
"""Time from submission to the due time of a request without a deadline, in seconds."""


class Worker:
    """Runs pipeline calls of many requests at once.

    Requests whose next step is of the same kind share an engine call. Requests that begin or end together share calls
    of the text encoder and the autoencoder.

        worker = Worker("sd15.offcut", max_in_flight=8)
        ticket = worker.submit({"prompt": "a lighthouse"}, schedule=Uniform(5), deadline=30)
        image = ticket.future.result().images[0]

    Prompts, seeds, guidance, numbers of steps, schedules and schedulers may differ. Requests with inputs of different
    shapes do not share calls with each other. The requests that share a call change an image only as far as the
    rounding of engines and modules depends on the batch size.

    All methods may be called from any thread.

    Args:
        pipe: a pipeline of ``offcut.load`` or ``offcut.attach``, which cannot be called until ``close``; or a bundle or
            its directory, which the worker loads.
        max_in_flight: largest number of requests in progress.
        max_queue: largest number of requests that wait in addition.
        cache_bytes: device memory for the cached features of all requests in flight. A request that finds no room waits
            at its first step; in a request with several trajectories, such as a panorama, further trajectories without
            room make full calls only.
        max_batch: largest number of rows of an engine call; a request has two rows for each image with guidance,
            otherwise one.
        batch_sizes: batch sizes that calls are padded to, e.g. for CUDA graphs; by default calls are not padded.
        policy: chooses the requests that share the next call.
        bound_shapes: number of sets of input shapes, including batch sizes, for which the engines keep buffers.
        patience: seconds that the engines wait for a request whose own code, such as a callback, blocks.
        options: options of ``offcut.load``, for a bundle.

    Raises:
        UserError: the pipeline has no engines, or is in use; or an argument is out of range.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        max_in_flight: int = 8,
        max_queue: int = 64,
        cache_bytes: int = 2**30,
        max_batch: int = 16,
        batch_sizes: Sequence[int] | None = None,
        policy: Policy | None = None,
        bound_shapes: int = 16,
        patience: float = 0.02,
        **options: Any,
    ) -> None:
        for name, value, minimum in (
            ("max_in_flight", max_in_flight, 1),
            ("max_queue", max_queue, 0),
            ("max_batch", max_batch, 1),
            ("bound_shapes", bound_shapes, 1),
            ("batch_sizes", min(batch_sizes or [1]), 1),
        ):
            if value < minimum:
                raise UserError(f"a worker's {name} is at least {minimum}, not {value}")
        self._owns_pipe = not hasattr(pipe, "unet")
        self._pipe: Any = load(pipe, **options) if self._owns_pipe else pipe
        unet = self._pipe.unet
        if not isinstance(unet, UNet):
            raise UserError(
                f"a worker needs a {type(self._pipe).__name__} with an offcut.UNet: make it with offcut.load(bundle), "
                "or call offcut.attach(pipe, bundle) first"
            )
        self.unet = unet
        """The UNet that owns the engines."""
        pair = unet.lend()
        self._max_in_flight, self._max_queue = max_in_flight, max_queue
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._keys = itertools.count()
        self._queue: list[tuple[float, int, WorkerRequest]] = []
        self._in_flight: set[WorkerRequest] = set()
        self._draining = self._closed = False
        self._fault: EngineFaultError | None = None
        self._queue_waits = Total()
        self._finished: dict[str, Total] = {}
        self._rejected = 0
        lanes = Lanes(
            pair,
            exclusive=unet.built_attention is not None,  # frames of such a UNet attend to one another
            max_batch=max_batch,
            batch_sizes=batch_sizes,
            max_bound=bound_shapes,
        )
        self._batcher = Batcher(
            pair,
            lanes,
            SlotPool(cache_bytes, unet.device),
            policy or Policy(),
            patience=patience,
            on_tick=self._expire_queued,
            on_fault=self._set_fault,
        )
        runners = [RequestRunner(self._pipe, unet, self._batcher) for _ in range(max_in_flight)]
        self._threads = [
            threading.Thread(target=self._serve, args=(runner,), name=f"offcut-request-{number}", daemon=True)
            for number, runner in enumerate(runners)
        ]
        for thread in self._threads:
            thread.start()

    # Requests

    def submit(
        self,
        arguments: Mapping[str, Any],
        *,
        schedule: Schedule | None = None,
        cut: str | None = None,
        forecast: Forecast | None = None,
        reuse_guidance: bool = False,
        scheduler: Any = None,
        pipeline: type | None = None,
        deadline: float | None = None,
        on_step: OnStep | None = None,
    ) -> Ticket:
        """Submit a pipeline call.

        Args:
            arguments: arguments of the pipeline call. Callbacks among them must not block, because all requests wait
                for them, except in ``outside``. Without a ``generator`` the request gets its own with a random seed.
            schedule: which UNet calls are full, see ``UNet.set_schedule``; None makes every call full. Caching costs
                quality.
            cut: name of the cut of the shallow calls; None for the bundle's first.
            forecast: prediction of the cached features, which doubles the memory for them; None reuses the features.
            reuse_guidance: on shallow calls, compute only the half of a guided batch with the prompt; see
                ``UNet.set_schedule``.
            scheduler: diffusers scheduler, which is copied; None for the pipeline's own.
            pipeline: another diffusers pipeline class with the same modules, e.g. ``StableDiffusionImg2ImgPipeline``.
            deadline: seconds from now after which the request is given up. Requests that are due earlier go first.
            on_step: called after each UNet call of the request, in the request's thread, while other requests run.

        Raises:
            QueueFullError: the queue is full.
            DeadlineError: the deadline is not in the future.
            WorkerClosedError: the worker is draining or closed.
            EngineFaultError: the engines failed earlier.
        """
        now = time.monotonic()
        with self._changed:
            self._admit(deadline)
            expires = None if deadline is None else now + deadline
            request = WorkerRequest(
                key=next(self._keys),
                arguments=arguments,
                schedule=schedule,
                cut=cut,
                forecast=forecast,
                reuse_guidance=reuse_guidance,
                scheduler=scheduler,
                pipeline=pipeline,
                submitted=now,
                expires=expires,
                due=now + HORIZON if expires is None else expires,
                on_step=on_step,
            )
            heapq.heappush(self._queue, (request.due, request.key, request))
            self._changed.notify_all()
        return Ticket(request, self._cancel)

    def expect_room(self) -> None:
        """Raise the error that ``submit`` would raise now, so that a request can be refused before it is prepared.

        Raises:
            QueueFullError: the queue is full.
            WorkerClosedError: the worker is draining or closed.
            EngineFaultError: the engines failed earlier.
        """
        with self._changed:
            self._admit()

    def _admit(self, deadline: float | None = None) -> None:
        try:
            self._check_admission(deadline)
        except (RequestError, EngineFaultError):
            self._rejected += 1
            raise

    def _check_admission(self, deadline: float | None) -> None:
        if self._fault is not None:
            raise copy_of(self._fault)
        if self._draining or self._closed:
            raise WorkerClosedError("this worker takes no more requests: send them to another one")
        free = self._max_in_flight - len(self._in_flight)
        if len(self._queue) >= self._max_queue + free:
            raise QueueFullError(
                f"{len(self._queue)} requests wait already, and {len(self._in_flight)} are in flight: try again later"
            )
        if deadline is not None and not (deadline > 0 and math.isfinite(deadline)):
            raise DeadlineError(f"a deadline of {deadline} s cannot be met: give seconds from now, more than 0")

    def _cancel(self, request: WorkerRequest) -> None:
        error = RequestCancelledError("the request was cancelled")
        with self._changed:
            queued = self._withdraw(lambda other: other is request)
        if queued:
            self._end_queued(request, error)
        else:
            self._batcher.stop(request, error)

    def outside(self) -> AbstractContextManager[object]:
        """Return a context for code that blocks in a request's thread, e.g. in a callback; other requests go on.

        The code must not call the pipeline's modules.
        """
        return self._batcher.outside()

    # State

    @property
    def healthy(self) -> bool:
        """Whether the engines work. After they failed the worker takes no requests: close it and open another one."""
        return self._fault is None and (self._closed or self._batcher.alive)

    @property
    def fault(self) -> str | None:
        """Why the worker is not healthy; None if it is."""
        if self._fault is None:
            return None if self.healthy else "the thread that runs the engines has ended"
        return str(self._fault)

    def statistics(self) -> Statistics:
        """Return a snapshot of the worker."""
        pool = self._batcher.pool
        with self._lock:
            statistics = Statistics(
                healthy=self.healthy,
                fault=self.fault,
                queued=len(self._queue),
                in_flight=len(self._in_flight),
                slots=pool.slots,
                cache_bytes=pool.used,
                cache_limit=pool.limit,
                queue_waits=self._queue_waits,
                requests=dict(self._finished),
                rejected=self._rejected,
            )
        return self._batcher.log.fill(statistics)

    def drain(self, timeout: float | None = None) -> bool:
        """Refuse new requests, and wait for the present ones. Return whether all finished within the timeout."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._queue and not self._in_flight, timeout)

    def close(self) -> None:
        """Cancel all requests, stop the threads, and give the engines back to the pipeline.

        A pipeline that the worker loaded is closed.
        """
        with self._changed:
            if self._closed:
                return
            self._draining = self._closed = True
            queued = self._withdraw(lambda request: True)
            in_flight = list(self._in_flight)
            self._changed.notify_all()
        error = WorkerClosedError("the worker was closed before the request was done: send it to another one")
        for request in queued:
            self._end_queued(request, error)
        for request in in_flight:
            self._batcher.stop(request, error)
        for thread in self._threads:
            thread.join()
        self._batcher.close()
        self.unet.take_back()
        if self._owns_pipe:
            self.unet.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # The threads of the request runners

    def _serve(self, runner: RequestRunner) -> None:
        while (request := self._next_request()) is not None:
            output, error = None, None
            try:
                output = runner.run(request)
            except BaseException as raised:  # only the sender of this request gets it
                error = raised
            self._finish(request, output, error)

    def _next_request(self) -> WorkerRequest | None:
        with self._changed:
            while True:
                while not self._queue and not self._closed:
                    self._changed.wait()
                if self._closed and not self._queue:
                    return None
                _, _, request = heapq.heappop(self._queue)
                if not request.future.set_running_or_notify_cancel():
                    continue
                request.started = time.monotonic()
                self._queue_waits = self._queue_waits.plus(request.started - request.submitted)
                self._in_flight.add(request)
                return request

    def _finish(self, request: WorkerRequest, output: Any, error: BaseException | None) -> None:
        with self._changed:
            self._in_flight.discard(request)
            self._count(request, error)
            self._changed.notify_all()
        if error is None:
            request.future.set_result(output)
        else:
            request.future.set_exception(error)

    def _end_queued(self, request: WorkerRequest, error: Exception) -> None:
        """End a request that was removed from the queue."""
        if request.future.set_running_or_notify_cancel():
            with self._changed:
                self._count(request, error)
                self._changed.notify_all()
            request.future.set_exception(error)

    def _count(self, request: WorkerRequest, error: BaseException | None) -> None:
        outcome = outcome_of(error)
        self._finished[outcome] = self._finished.get(outcome, Total()).plus(time.monotonic() - request.submitted)

    def _withdraw(self, matches: Callable[[WorkerRequest], bool]) -> list[WorkerRequest]:
        """Remove matching requests from the queue, and return them."""
        withdrawn = [request for _, _, request in self._queue if matches(request)]
        if withdrawn:
            self._queue = [entry for entry in self._queue if not matches(entry[2])]
            heapq.heapify(self._queue)
        return withdrawn

    def _expire_queued(self) -> None:
        now = time.monotonic()
        with self._changed:
            expired = self._withdraw(lambda request: request.expires is not None and request.expires < now)
        for request in expired:
            self._end_queued(
                request,
                DeadlineError("the request's deadline passed in the queue: allow more time, or send fewer at once"),
            )

    def _set_fault(self, fault: EngineFaultError) -> None:
        with self._changed:
            self._fault = fault
            queued = self._withdraw(lambda request: True)
        for request in queued:
            self._end_queued(request, copy_of(fault))


def outcome_of(error: BaseException | None) -> str:
    """Return the key in ``Statistics.requests`` for a request that ended with this error; None for no error."""
    if error is None:
        return "done"
    return next((name for kind, name in _OUTCOMES.items() if isinstance(error, kind)), "failed")


_OUTCOMES: dict[type[Exception], str] = {
    RequestCancelledError: "cancelled",
    WorkerClosedError: "cancelled",
    DeadlineError: "expired",
    EngineFaultError: "fault",
}
