"""A request that a replica draws: sent to one, and to another with the same seed where the first is lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import replace
from typing import Any, Self

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException

from ....errors import DeadlineError, EngineFaultError, ReplicaLostError, WorkerClosedError
from ..going import Drawn, Going, Preview, Progress
from ..schemas import GenerationRequest
from ..wanted import Wanted
from .messages import Begun, Failed
from .metrics import ClusterMetrics
from .send import Send

log = logging.getLogger("offcut.server")

LOSSES = 3
"""Replicas that may be lost under one request. One that kills whoever draws it must not go through all of them."""

_SHORTEST, _LONGEST = 0.05, 1.0
"""Seconds between tries."""


class _Lost(Exception):
    """Nobody knows how far the replica came; drawing again with the same seed gives the same image."""


class RemoteDrawing(Going):
    """A request on its way through replicas.

    An actor's call is made at most once, so each try is a new one. A client that reads a stream hears of every step
    once, however many replicas it takes.

    Args:
        send: one try.
        body: what the client asked for.
        asked: the same with what it left out.
        metrics: are told of each step.
        closed: called at the end of the context.
    """

    def __init__(
        self,
        send: Send,
        body: GenerationRequest,
        asked: Wanted,
        metrics: ClusterMetrics,
        closed: Callable[[Self], None],
    ) -> None:
        super().__init__(asked, closed)
        self.begun: float | None = None
        """When a replica first took it, on ``time.monotonic``."""
        self._send, self._body, self._metrics = send, body, metrics
        self._submitted = time.monotonic()
        self._steps, self._previews = 0, 0
        self._task = asyncio.create_task(self._work())

    async def result(self) -> Drawn:
        drawn: Drawn = await asyncio.shield(self._ended)
        return drawn

    def _stop(self) -> None:
        self._task.cancel()

    async def _work(self) -> None:
        try:
            async with asyncio.timeout(self.asked.seconds):
                self._end(await self._until_drawn())
        except TimeoutError:
            self._end(DeadlineError("the request was not done by its deadline: allow more time, or send fewer at once"))
        except Exception as error:
            self._end(error)

    async def _until_drawn(self) -> Drawn:
        losses, pause = 0, _SHORTEST
        while True:
            taken = False
            try:
                async with aclosing(self._send(self._again())) as messages:
                    async for message in messages:
                        if isinstance(message, Begun):
                            taken = True
                            self._begin()
                        elif isinstance(message, Drawn):
                            return self._done(message)
                        elif isinstance(message, Failed):
                            raise message.error
                        else:
                            self._pass_on(message)
                    raise _Lost("its messages ended")
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                why = "its call was cancelled"  # by a replica that ends
            except RayTaskError:
                raise  # a bug in it
            except (RayError, RayServeException, EngineFaultError, WorkerClosedError, _Lost) as error:
                why = f"{type(error).__name__}: {error}".partition("\n")[0]
            losses += taken
            log.warning("a request goes to another replica after %d losses: %s", losses, why)
            if losses >= LOSSES:
                raise ReplicaLostError(f"{losses} replicas were lost that drew it")
            self._metrics.resends.inc()
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST)

    def _again(self) -> dict[str, Any]:
        """The body with the seed of the first try, and the seconds that are left."""
        left = max(self.asked.seconds - (time.monotonic() - self._submitted), 0.001)
        changed = self._body.model_copy(update={"seed": self.asked.seed, "timeout": left})
        return changed.model_dump(exclude_none=True)

    def _begin(self) -> None:
        if self.begun is None:
            self.begun = time.monotonic()
            self._metrics.queue_seconds.observe(self.begun - self._submitted)

    def _pass_on(self, message: tuple[Progress, ...] | Preview) -> None:
        if isinstance(message, Preview):
            if message.index >= self._previews:
                self._previews = message.index + 1
                self.events.put_nowait(message)
            return
        for step in message:
            if step.step > self._steps:
                self._steps = step.step
                self._metrics.step_seconds.labels(step.kind).observe(step.seconds)
                if self._body.stream:
                    self.events.put_nowait(step)

    def _done(self, drawn: Drawn) -> Drawn:
        waited = (self.begun or self._submitted) - self._submitted
        return replace(drawn, queue_seconds=waited + drawn.queue_seconds)
