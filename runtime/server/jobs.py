"""Image jobs: a request in progress, its events and its result."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from ...errors import InternalError, LimitError
from ..batching import Step, Ticket, Worker
from ..batching.worker import outcome_of
from .metrics import SKIPPED, ServerMetrics
from .params import ImageParams

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


@dataclass(frozen=True)
class Progress:
    """Event: a UNet call of the job has completed.

    Attributes:
        step: number of the call, from 1.
        total: number of calls that the job makes; None if it is unknown.
        kind: ``full``, ``shallow``, or ``skipped`` if no engine ran.
        seconds: time since the previous call, or since work on the request began.
        rows: rows of the engine call, which other requests may share; 0 if no engine ran.
    """

    step: int
    total: int | None
    kind: str
    seconds: float
    rows: int


@dataclass(frozen=True)
class Preview:
    """Event: a preview of the unfinished image.

    Attributes:
        index: number of the preview, from 0.
        step: scheduler step after which it was decoded, from 1.
        size: width and height in pixels.
        png: the PNG file in base64.
    """

    index: int
    step: int
    size: tuple[int, int]
    png: str


Event = Progress | Preview


@dataclass(frozen=True)
class ImageResult:
    """Images of a completed job.

    Attributes:
        images: PNG files in base64.
        seconds: time from the beginning of the work to its end, without the time for previews.
        queue_seconds: time from arrival to the beginning of the work.
        timeline: UNet calls in order: ``#`` full, ``.`` shallow, ``_`` skipped (no engine ran).
    """

    images: tuple[str, ...]
    seconds: float
    queue_seconds: float
    timeline: str


class ImageJob(ABC):
    """An image request in progress.

    A job is created and used in the event loop. It is a context manager that cancels unfinished work on exit.

    Args:
        params: parameters of the request.
        on_close: called with the job when the context ends.
    """

    def __init__(self, params: ImageParams, on_close: Callable[[Any], None]) -> None:
        self.params = params
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        """Events, one by one if the client reads a stream, otherwise all at the end. None follows the last event."""
        self._completion: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._on_close = on_close
        self._closed = False

    @property
    def outcome(self) -> str:
        """``done``, ``failed``, ``cancelled``, ``expired`` or ``fault``."""
        if not self._completion.done():
            return "cancelled"
        return outcome_of(self._completion.exception())

    @abstractmethod
    async def result(self) -> ImageResult:
        """Wait for the images.

        Raises:
            Exception: the job failed or was cancelled.
        """

    @abstractmethod
    def _stop(self) -> None:
        """Cancel the work, unless it has ended."""

    def fail(self, error: Exception) -> None:
        """Stop the work at its next step, and end the job with this error at once."""
        self._stop()
        self._end(error)

    def _end(self, result: object) -> None:
        """End the job with a result or an exception. Later calls have no effect."""
        if self._completion.done() or self._closed:
            return
        if isinstance(result, BaseException):
            self._completion.set_exception(result)
        else:
            self._completion.set_result(result)
        self.events.put_nowait(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._completion.done() and not self._completion.cancelled():
            self._completion.exception()  # asyncio logs exceptions that nobody retrieves
        self._closed = True
        self._on_close(self)


class WorkerJob(ImageJob):
    """An image request in a worker of this process: the worker's threads generate, a coroutine waits.

    Args:
        worker: worker that runs the request.
        params: parameters of the request.
        metrics: metrics that record each UNet call and the queue time.
        on_close: called with the job when the context ends.

    Raises:
        RequestError, EngineFaultError: the worker refuses the request.
    """

    def __init__(
        self,
        worker: Worker,
        params: ImageParams,
        metrics: ServerMetrics,
        on_close: Callable[[WorkerJob], None],
    ) -> None:
        super().__init__(params, on_close)
        self._loop = asyncio.get_running_loop()
        self._metrics = metrics
        self._timeline: list[str] = []
        self._unsent: list[Progress] = []
        self._submitted = self._last_call_time = time.monotonic()
        arguments = params.pipeline_arguments()
        if params.previews:
            arguments["callback_on_step_end"] = self._on_step_end
        self._preview_count, self._preview_seconds = 0, 0.0
        self._has_ticket = threading.Event()
        self._ticket: Ticket = worker.submit(
            arguments,
            schedule=params.caching.schedule,
            cut=params.caching.cut,
            forecast=params.caching.forecast,
            deadline=params.timeout,
            on_step=self._on_call,
        )
        self._has_ticket.set()
        self._ticket.future.add_done_callback(lambda future: self._call_in_loop(self._finish))

    async def result(self) -> ImageResult:
        output = await asyncio.shield(self._completion)
        ended = time.monotonic()
        if any(getattr(output, "nsfw_content_detected", None) or ()):  # the pipeline has blackened the image
            raise LimitError("prompt", "the model's safety checker blocked the image: try another prompt or seed")
        started = self._ticket.started
        if started is None:
            raise InternalError("a request ended before its work began")
        images = await asyncio.to_thread(lambda: tuple(encode_png(image) for image in output.images))
        return ImageResult(
            images=images,
            seconds=ended - started - self._preview_seconds,
            queue_seconds=started - self._submitted,
            timeline="".join(self._timeline),
        )

    def _stop(self) -> None:
        if not self._ticket.future.done():
            self._ticket.cancel()

    # Called in the event loop

    def _finish(self) -> None:
        future = self._ticket.future
        if self._ticket.started is not None:
            self._metrics.queue_seconds.observe(self._ticket.started - self._submitted)
        for event in self._unsent:
            self.events.put_nowait(event)
        error = future.exception()
        self._end(future.result() if error is None else error)

    # Called in the request's thread

    def _on_call(self, step: Step) -> None:
        self._has_ticket.wait()  # the first call may complete before `submit` has returned
        now = time.monotonic()
        started = self._ticket.started if step.call == 0 else None
        seconds = now - (self._last_call_time if started is None else started)
        self._last_call_time = now
        kind, mark = ("full", "#") if step.full else ("shallow", ".") if step.rows else (SKIPPED, "_")
        self._timeline.append(mark)
        self._metrics.step_seconds.labels(kind).observe(seconds)
        event = Progress(step.call + 1, step.calls, kind, seconds, step.rows)
        if self.params.stream:
            self._call_in_loop(lambda: self.events.put_nowait(event))
        else:  # nobody reads the event yet, so it does not wake the event loop
            self._unsent.append(event)

    def _on_step_end(self, pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step in preview_steps(pipe.num_timesteps, self.params.previews):
            began = time.monotonic()
            image = decode_preview(pipe, tensors["latents"], timestep)
            event = Preview(self._preview_count, step + 1, image.size, encode_png(image))
            self._preview_count += 1
            self._call_in_loop(lambda: self.events.put_nowait(event))
            seconds = time.monotonic() - began
            self._preview_seconds += seconds
            self._last_call_time += seconds
        return tensors

    def _call_in_loop(self, function: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop is closed: the server has stopped
            self._loop.call_soon_threadsafe(function)


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """Return the steps, from 0, after which previews are decoded: evenly spread, and never after the last step.

    >>> sorted(preview_steps(20, 3))
    [4, 9, 14]
    """
    chosen = (steps * (index + 1) // (count + 1) - 1 for index in range(count))
    return frozenset(step for step in chosen if 0 <= step < steps - 1)


def decode_preview(pipe: Any, latents: torch.Tensor, timestep: Any) -> Image:
    """Decode the first latent of a batch at half its width and height.

    Each 2x2 block of latents is averaged, which halves the noise. Decoding takes a quarter of the time of the final
    image.

    Args:
        pipe: pipeline whose autoencoder decodes; called from its step callback.
        latents: [batch, channels, height, width] after the step.
        timestep: timestep of the step. Schedulers whose latents have the scale of the noise (Euler) need it to
            rescale them.
    """
    import torch

    vae = pipe.vae
    with torch.no_grad():
        scaled = pipe.scheduler.scale_model_input(latents[:1], timestep)
        small = torch.nn.functional.avg_pool2d(scaled.float(), 2)  # [1, channels, height/2, width/2]
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        small = small / vae.config.scaling_factor
        if mean is not None and deviation is not None:
            shape = (1, len(mean), 1, 1)
            small = small * torch.tensor(deviation).view(shape).to(small) + torch.tensor(mean).view(shape).to(small)
        decoded = vae.decode(small.to(latents.dtype), return_dict=False)[0]
        image: Image = pipe.image_processor.postprocess(decoded, output_type="pil")[0]
    return image


def encode_png(image: Image) -> str:
    """Return the image as a PNG file in base64."""
    file = io.BytesIO()
    image.save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()
