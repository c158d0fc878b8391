"""One request on its way: a worker's threads draw, a coroutine waits and tells its client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import InternalError, LimitError
from ..batching import Step, Ticket, Worker
from ..batching.worker import outcome_of
from .metrics import Metrics
from .previews import preview, preview_steps
from .wanted import Wanted

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Progress:
    """A UNet call that was made.

    Attributes:
        step: its number, from 1.
        total: how many there will be; None where nobody knows.
        kind: ``full`` or ``shallow``.
        seconds: since the last one, or since work on the request began.
        rows: of the engine call that others may have shared.
    """

    step: int
    total: int | None
    kind: str
    seconds: float
    rows: int


@dataclass(frozen=True)
class Preview:
    """What the image looks like so far: a PNG in base64, and after which step of the scheduler, from 1."""

    index: int
    step: int
    size: tuple[int, int]
    png: str


Event = Progress | Preview


@dataclass(frozen=True)
class Drawn:
    """What came of a request.

    Attributes:
        images: as PNG in base64.
        seconds: from the beginning of the work to its end, previews left out.
        queue_seconds: before that.
        timeline: of the UNet calls, ``#`` for a full and ``.`` for a shallow one.
    """

    images: tuple[str, ...]
    seconds: float
    queue_seconds: float
    timeline: str


class Drawing:
    """A request in a worker. Made, and used, in the event loop; a context that gives up what is unfinished at its end.

    Args:
        worker: draws.
        asked: what.
        metrics: are told of each step and of the end.
        closed: called at the end of the context.

    Raises:
        RequestError, EngineFaultError: the worker does not take it.
    """

    def __init__(self, worker: Worker, asked: Wanted, metrics: Metrics, closed: Callable[[Drawing], None]) -> None:
        self.asked = asked
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        """Of the drawing as it goes on; None at its end."""
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Any] = self._loop.create_future()
        self._metrics, self._closed = metrics, closed
        self._left = False
        self._timeline: list[str] = []
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

    @property
    def outcome(self) -> str:
        """``done``, ``failed``, ``cancelled``, ``expired`` or ``fault``."""
        if not self._ended.done():
            return "cancelled"
        return outcome_of(self._ended.exception())

    async def result(self) -> Drawn:
        """The images, once they are done.

        Raises:
            Exception: what the request came to instead.
        """
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

    def fail(self, error: Exception) -> None:
        """Tell the client this, whatever becomes of the drawing, and stop that at its next step."""
        self._ticket.cancel()
        if not self._ended.done():
            self._ended.set_exception(error)
            self.events.put_nowait(None)

    def __enter__(self) -> Drawing:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ticket.future.done():
            self._ticket.cancel()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # whoever went away does not ask for it
        self._left = True
        self._closed(self)

    # In the loop

    def _finish(self) -> None:
        future = self._ticket.future
        if self._ticket.started is not None:
            self._metrics.queue_seconds.observe(self._ticket.started - self._submitted)
        if self._ended.done() or self._left:
            return
        error = future.exception()
        if error is None:
            self._ended.set_result(future.result())
        else:
            self._ended.set_exception(error)
        self.events.put_nowait(None)

    # In the request's thread

    def _stepped(self, step: Step) -> None:
        self._sent.wait()  # the first step may be made before `submit` has returned
        now = time.monotonic()
        began = self._ticket.started if step.call == 0 else None
        seconds = now - (self._last if began is None else began)
        self._last = now
        kind = "full" if step.full else "shallow"
        self._timeline.append("#" if step.full else ".")
        self._metrics.step_seconds.labels(kind).observe(seconds)
        event = Progress(step.call + 1, step.calls, kind, seconds, step.rows)
        self._tell(lambda: self.events.put_nowait(event))

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
