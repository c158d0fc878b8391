"""Server-sent events: a drawing as it goes on, in the frames that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from .going import Event, Going, Preview
from .problems import Problem
from .replies import completed

_QUIET = 15.0
"""Seconds without an event after which a comment is sent, so that no proxy takes the connection for dead."""

_HEADERS = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store", "x-accel-buffering": "no"}


class EventStream(Response):
    """The reply to a request with ``stream``; whoever stops reading stops the drawing.

    Args:
        drawing: is closed at the end.
        problem: tells a client of an error.
    """

    def __init__(self, drawing: Going, problem: Callable[[BaseException], Problem]) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._drawing, self._problem = drawing, problem

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._drawing:
            telling = asyncio.ensure_future(self._tell(send))
            leaving = asyncio.ensure_future(gone(receive))
            try:
                await asyncio.wait({telling, leaving}, return_when=asyncio.FIRST_COMPLETED)
                if telling.done():
                    telling.result()
            finally:
                await cancel(telling, leaving)

    async def _tell(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async for part in self._frames():
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _frames(self) -> AsyncIterator[bytes]:
        drawing = self._drawing
        while True:
            try:
                event = await asyncio.wait_for(drawing.events.get(), _QUIET)
            except TimeoutError:
                yield b": still at it\n\n"
                continue
            if event is None:
                break
            yield frame(_event(event))
        try:
            drawn = await drawing.result()
        except Exception as error:
            yield frame(self._problem(error).body(), "error")
            return
        yield frame(completed(drawing.asked, drawn))
        yield b"data: [DONE]\n\n"


async def gone(receive: Receive) -> None:
    """Returns when the client went away."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def cancel(*tasks: asyncio.Future[Any]) -> None:
    """Stop them, and wait until they have."""
    for task in tasks:
        task.cancel()
    for task in tasks:
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await task


def frame(data: Mapping[str, Any], event: str | None = None) -> bytes:
    """One event; its name is the data's type."""
    return f"event: {event or data['type']}\ndata: {json.dumps(data)}\n\n".encode("ascii")


def _event(event: Event) -> dict[str, Any]:
    if isinstance(event, Preview):
        return {
            "type": "image_generation.partial_image",
            "partial_image_index": event.index,
            "b64_json": event.png,
            "created_at": int(time.time()),
            "size": f"{event.size[0]}x{event.size[1]}",
            "quality": "auto",
            "background": "opaque",
            "output_format": "png",
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
