"""Replies to a generation request: finished images, or server-sent events in the format of OpenAI's API."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .http import Problem, size_text
from .jobs import Event, ImageJob, ImageResult, Preview
from .params import ImageParams

_KEEP_ALIVE = 15.0
"""Seconds without an event after which a comment is sent, so that proxies keep the connection open."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}

_FORMAT = {"background": "opaque", "output_format": "png", "quality": "auto"}


def images_body(params: ImageParams, result: ImageResult) -> dict[str, Any]:
    """Return OpenAI's ``ImagesResponse``; its field ``offcut`` says how the images were made."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": png} for png in result.images],
        "size": size_text(params.size),
        **_FORMAT,
        "offcut": _details(params, result),
    }


class EventStream(Response):
    """Reply to a request with ``stream``. A client that stops reading cancels the job.

    Args:
        job: job whose events are sent; it is closed at the end.
        problem: function that converts an error to the problem that the client gets.
    """

    def __init__(self, job: ImageJob, problem: Callable[[BaseException], Problem]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._job, self._problem = job, problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            send_task = asyncio.ensure_future(self._send(send))
            disconnect = asyncio.ensure_future(wait_for_disconnect(receive))
            try:
                await asyncio.wait({send_task, disconnect}, return_when=asyncio.FIRST_COMPLETED)
                if send_task.done():
                    send_task.result()
            finally:
                await cancel(send_task, disconnect)

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for frame in self._frames():
            await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self) -> AsyncIterator[bytes]:
        while True:
            try:
                event = await asyncio.wait_for(self._job.events.get(), _KEEP_ALIVE)
            except TimeoutError:
                yield b": keep-alive\n\n"
                continue
            if event is None:
                break
            yield encode_event(_event_body(event))
        try:
            result = await self._job.result()
        except Exception as error:
            yield encode_event(self._problem(error).body(), "error")
            return
        yield encode_event(_completed_body(self._job.params, result))
        yield b"data: [DONE]\n\n"


async def wait_for_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Cancel tasks and wait until they have ended."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def encode_event(data: Mapping[str, Any], name: str | None = None) -> bytes:
    """Return one server-sent event; its name is the data's ``type`` by default."""
    return f"event: {name or data['type']}\ndata: {json.dumps(data)}\n\n".encode("ascii")


def _event_body(event: Event) -> dict[str, Any]:
    if isinstance(event, Preview):
        return {
            "type": "image_generation.partial_image",
            "partial_image_index": event.index,
            "b64_json": event.png,
            "created_at": int(time.time()),
            "size": size_text(event.size),
            **_FORMAT,
            "step": event.step,
        }
    return {
        "type": "image_generation.progress",
        "step": event.step,
        "total": event.total,
        "kind": event.kind,
        "seconds": round(event.seconds, 6),
        "rows": event.rows,
    }


def _completed_body(params: ImageParams, result: ImageResult) -> dict[str, Any]:
    """Return OpenAI's event at the end of a stream."""
    return {
        "type": "image_generation.completed",
        "b64_json": result.images[0],
        "created_at": int(time.time()),
        "size": size_text(params.size),
        **_FORMAT,
        "offcut": _details(params, result),
    }


def _details(params: ImageParams, result: ImageResult) -> dict[str, Any]:
    forecast = params.caching.forecast
    return {
        "seed": params.seed,
        "schedule": params.caching.schedule_name,
        "forecast": None if forecast is None else str(forecast),
        "timeline": result.timeline,
        "full_calls": result.timeline.count("#"),
        "shallow_calls": result.timeline.count("."),
        "skipped_calls": result.timeline.count("_"),
        "seconds": round(result.seconds, 6),
        "queue_seconds": round(result.queue_seconds, 6),
    }
