"""A request in a worker: its threads draw, a coroutine waits and tells its client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...errors import InternalError, LimitError
from ..batching import Step, Ticket, Worker
from .going import Drawn, Going, Preview, Progress
from .metrics import SKIPPED, Metrics
from .previews import preview, preview_steps
from .wanted import Wanted

if TYPE_CHECKING:
    from PIL.Image import Image


class Drawing(Going):
    """A request in a worker.

    Args:
        worker: draws.
        asked: what.
        metrics: are told of each step and of the end.
        closed: called at the end of the context.

    Raises:
        RequestError, EngineFaultError: the worker does not take it.
    """

    def __init__(self, worker: Worker, asked: Wanted, metrics: Metrics, closed: Callable[[Drawing], None]) -> None:
        super().__init__(asked, closed)
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._timeline: list[str] = []
        self._untold: list[Progress] = []
        self._submitted = self._last = time.monotonic()
        arguments = asked.pipeline_arguments()
        if asked.previews:
            arguments["callback_on_step_end"] = self._step_ended
        self._previews_made, self._preview_seconds = 0, 0.0
        self._sent = threading.Event()
        self._ticket: Ticket = worker.submit(
            arguments,
            schedule=asked.schedule,
            cut=asked.cut,
            forecast=asked.forecast,
            deadline=asked.seconds,
            on_step=self._stepped,
        )
        self._sent.set()
        self._ticket.future.add_done_callback(lambda future: self._tell(self._finish))

    async def result(self) -> Drawn:
        output = await asyncio.shield(self._ended)
        done = time.monotonic()
        if any(getattr(output, "nsfw_content_detected", None) or ()):  # then it is black
            raise LimitError("prompt", "the model's safety checker held the image back: try another prompt or seed")
        started = self._ticket.started
        if started is None:
            raise InternalError("a request ended that had not begun")
        images = await asyncio.to_thread(lambda: tuple(png(image) for image in output.images))
        return Drawn(
            images=images,
            seconds=done - started - self._preview_seconds,
            queue_seconds=started - self._submitted,
            timeline="".join(self._timeline),
        )

    def _stop(self) -> None:
        if not self._ticket.future.done():
            self._ticket.cancel()

    # In the loop

    def _finish(self) -> None:
        future = self._ticket.future
        if self._ticket.started is not None:
            self._metrics.queue_seconds.observe(self._ticket.started - self._submitted)
        for event in self._untold:
            self.events.put_nowait(event)
        error = future.exception()
        self._end(future.result() if error is None else error)

    # In the request's thread

    def _stepped(self, step: Step) -> None:
        self._sent.wait()  # the first step may be made before `submit` has returned
        now = time.monotonic()
        began = self._ticket.started if step.call == 0 else None
        seconds = now - (self._last if began is None else began)
        self._last = now
        kind, mark = ("full", "#") if step.full else ("shallow", ".") if step.rows else (SKIPPED, "_")
        self._timeline.append(mark)
        self._metrics.step_seconds.labels(kind).observe(seconds)
        event = Progress(step.call + 1, step.calls, kind, seconds, step.rows)
        if self.asked.stream:
            self._tell(lambda: self.events.put_nowait(event))
        else:  # nobody waits for it, so the loop's thread sleeps on
            self._untold.append(event)

    def _step_ended(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in preview_steps(pipe.num_timesteps, self.asked.previews):
            began = time.monotonic()
            image = preview(pipe, tensors["latents"], timestep)
            event = Preview(self._previews_made, step + 1, image.size, png(image))
            self._previews_made += 1
            self._tell(lambda: self.events.put_nowait(event))
            spent = time.monotonic() - began
            self._preview_seconds += spent
            self._last += spent
        return tensors

    def _tell(self, what: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server has stopped, and nobody listens
            self._loop.call_soon_threadsafe(what)


def png(image: Image) -> str:
    """A PNG in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
