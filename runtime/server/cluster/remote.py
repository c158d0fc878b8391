"""Jobs that run in replicas: the messages of a replica, and a job that is sent again if its replica is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from ....errors import DeadlineError, EngineFaultError, ReplicaLostError, WorkerClosedError
from ..jobs import ImageJob, ImageResult, Preview, Progress
from ..metrics import ClusterMetrics
from ..params import ImageParams
from ..schemas import GenerationRequest

log = logging.getLogger("offcut.server")

MAX_LOSSES = 3
"""Replicas that one request may lose before it fails: a request that kills replicas must not kill all of them."""

_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
"""Seconds between two tries."""


@dataclass(frozen=True)
class JobStarted:
    """First message of a job: a replica has accepted it.

    Attributes:
        replica: name of the replica.
    """

    replica: str


@dataclass(frozen=True)
class JobFailed:
    """Last message of a job that failed.

    Attributes:
        error: one of offcut's own exceptions, which every process can unpickle.
    """

    error: Exception


Message = JobStarted | tuple[Progress, ...] | Preview | ImageResult | JobFailed
"""Messages of one job: first its start, then events, and last its result or failure.

The events of UNet calls come one by one if the client reads a stream, otherwise all together.
"""

SendJob = Callable[[Mapping[str, Any]], AsyncGenerator[Message]]
"""Sends a request body to one replica; closing the generator cancels the work there."""


class _ReplicaLost(Exception):
    """The replica has stopped responding. Another try with the same seed gives the same image."""


class RemoteJob(ImageJob):
    """An image request in the replicas of a cluster.

    Ray does not repeat a failed call, so each try is a new call. A client that reads a stream gets the event of each
    step once, even if the job needs several tries.

    Args:
        send: sends the job to one replica; called for each try.
        body: body of the request.
        params: parameters that were resolved from the body.
        metrics: metrics that record steps, queue time and tries.
        on_close: called with the job when the context ends.
    """

    def __init__(
        self,
        send: SendJob,
        body: GenerationRequest,
        params: ImageParams,
        metrics: ClusterMetrics,
        on_close: Callable[[RemoteJob], None],
    ) -> None:
        super().__init__(params, on_close)
        self.started: float | None = None
        """Time at which a replica first accepted the job, on ``time.monotonic``."""
        self._send, self._body, self._metrics = send, body, metrics
        self._submitted = time.monotonic()
        self._steps, self._previews = 0, 0
        self._task = asyncio.create_task(self._run())

    async def result(self) -> ImageResult:
        result: ImageResult = await asyncio.shield(self._completion)
        return result

    def _stop(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        try:
            async with asyncio.timeout(self.params.timeout):
                self._end(await self._try_until_done())
        except TimeoutError:
            self._end(DeadlineError("the request was not done by its deadline: allow more time, or send fewer at once"))
        except Exception as error:
            self._end(error)

    async def _try_until_done(self) -> ImageResult:
        losses, pause = 0, _FIRST_PAUSE
        while True:
            accepted = False
            try:
                async with aclosing(self._send(self._try_body())) as messages:
                    async for message in messages:
                        if isinstance(message, JobStarted):
                            accepted = True
                            self._on_start()
                        elif isinstance(message, ImageResult):
                            return self._with_queue_time(message)
                        elif isinstance(message, JobFailed):
                            raise message.error
                        else:
                            self._pass_on(message)
                    raise _ReplicaLost("its messages ended")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                reason = "its call was cancelled"  # by a replica that shuts down
            except RayTaskError:
                raise  # a bug in the replica
            except (RayError, RayServeException, EngineFaultError, WorkerClosedError, _ReplicaLost) as error:
                reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            losses += accepted
            log.warning("a request is sent to another replica after %d lost replicas: %s", losses, reason)
            if losses >= MAX_LOSSES:
                raise ReplicaLostError(f"{losses} replicas were lost while they worked on the request")
            self._metrics.resends.inc()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _try_body(self) -> dict[str, Any]:
        """Return the body with the resolved seed, so that every try gives the same image, and with the time left."""
        seconds = max(self.params.timeout - (time.monotonic() - self._submitted), 0.001)
        body = self._body.model_copy(update={"seed": self.params.seed, "timeout": seconds})
        return body.model_dump(exclude_none=True)

    def _on_start(self) -> None:
        if self.started is None:
            self.started = time.monotonic()
            self._metrics.queue_seconds.observe(self.started - self._submitted)

    def _pass_on(self, message: tuple[Progress, ...] | Preview) -> None:
        """Pass events on to the client, except for those that an earlier try has passed on."""
        if isinstance(message, Preview):
            if message.index >= self._previews:
                self._previews = message.index + 1
                self.events.put_nowait(message)
            return
        for event in message:
            if event.step > self._steps:
                self._steps = event.step
                self._metrics.step_seconds.labels(event.kind).observe(event.seconds)
                if self._body.stream:
                    self.events.put_nowait(event)

    def _with_queue_time(self, result: ImageResult) -> ImageResult:
        """Add the time until a replica accepted the job to the queue time of the result."""
        waited = (self.started or self._submitted) - self._submitted
        return replace(result, queue_seconds=waited + result.queue_seconds)


def sender(replicas: Any, model: str | None, each_step: bool, sticky: bool) -> SendJob:
    """Return a function that sends a job through a Ray Serve handle, which chooses a replica with a free place.

    Args:
        replicas: handle of the replicas.
        model: name of the model; None for the default.
        each_step: whether the replica sends each step at once.
        sticky: whether to prefer replicas that have the model open.
    """
    options = {"multiplexed_model_id": model} if sticky and model is not None else {}
    generate = replicas.options(stream=True, method_name="generate", **options)

    async def send(body: Mapping[str, Any]) -> AsyncGenerator[Message]:
        response = generate.remote(model, body, each_step)
        ended = False
        try:
            async for message in response:
                ended = isinstance(message, ImageResult | JobFailed)
                yield message
        finally:
            if not ended:
                response.cancel()

    return send
