"""Clients of an image server in closed loops, where each client waits for its image, and in open loops."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...errors import InternalError

Body = Callable[[int], Mapping[str, Any]]
"""Function that returns the JSON body of the n-th request."""

Leaving = Callable[[int], float | None]
"""Function that returns the seconds after which the n-th request's client disconnects, or None if it waits."""

LEFT, LOST = 0, -1
"""Values in place of an HTTP status: the client disconnected before the reply, or the connection failed."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Reply:
    """The reply to a request; times are readings of ``time.perf_counter``.

    Attributes:
        due: when the request should have been sent.
        sent: when the request was sent.
        ended: when the whole reply had arrived.
        status: HTTP status, ``LEFT`` or ``LOST``.
        code: code of an error.
        retry_after: whether the reply has the header Retry-After.
    """

    due: float
    sent: float
    ended: float
    status: int
    code: str | None = None
    retry_after: bool = False

    @property
    def latency(self) -> float:
        """Seconds from when the request was due until the reply had arrived, so that delays of the client count."""
        return self.ended - self.due

    @property
    def has_image(self) -> bool:
        return self.status == 200

    @property
    def refused(self) -> bool:
        """Whether the server refused the request as a full server should: with 429 or 503 and Retry-After."""
        return self.status in (429, 503) and self.retry_after


class Client:
    """An HTTP client that keeps its connections open; an asynchronous context.

    It uses aiohttp, which takes half of httpx's processor time: client and server share the processor.

    Args:
        url: URL of the server.
        body: function that returns the body of each request.
    """

    def __init__(self, url: str, body: Body) -> None:
        self._url, self._body = f"{url}/v1/images/generations", body

    async def __aenter__(self) -> Client:
        import aiohttp

        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.close()

    async def send(self, number: int, due: float | None = None, leave: float | None = None) -> Reply:
        """Send the n-th request and wait for its reply.

        Args:
            due: when the request should be sent; now by default.
            leave: seconds after which the client disconnects; None if it waits.

        Raises:
            InternalError: a reply with status 200 has no image.
        """
        import aiohttp

        sent = time.perf_counter()
        due = sent if due is None else due
        try:
            async with asyncio.timeout(leave):
                async with self._http.post(self._url, json=dict(self._body(number))) as reply:
                    content = await reply.read()
        except TimeoutError:
            return Reply(due, sent, time.perf_counter(), LEFT)
        except aiohttp.ClientError as error:
            return Reply(due, sent, time.perf_counter(), LOST, type(error).__name__)
        ended = time.perf_counter()
        if reply.status != 200:
            return Reply(due, sent, ended, reply.status, _code(content), "retry-after" in reply.headers)
        for image in json.loads(content)["data"]:
            if not base64.b64decode(image["b64_json"][:16]).startswith(_PNG):
                raise InternalError("the server answered 200 without a PNG")
        return Reply(due, sent, ended, 200)


def _code(content: bytes) -> str:
    try:
        return str(json.loads(content)["error"]["code"])
    except (ValueError, KeyError, TypeError):
        return "no error of this server"


@dataclass(frozen=True)
class Window:
    """A measured span of time with its replies.

    Attributes:
        replies: all replies, also to requests that began before the window or ended after it.
        began, ended: begin and end of the window.
    """

    replies: tuple[Reply, ...]
    began: float
    ended: float

    @property
    def throughput(self) -> float:
        """Images a second.

        An image at an edge of the window counts with the share of its time inside. Otherwise batches that end together
        would make the figure jump.
        """
        return sum(self._share(reply) for reply in self.replies if reply.has_image) / (self.ended - self.began)

    @property
    def latencies(self) -> list[float]:
        """Latencies of the images whose requests were due inside the window."""
        return [reply.latency for reply in self.replies if reply.has_image and self.began <= reply.due < self.ended]

    def _share(self, reply: Reply) -> float:
        inside = min(reply.ended, self.ended) - max(reply.sent, self.began)
        return max(inside, 0.0) / (reply.ended - reply.sent)


async def closed_loop(
    client: Client, count: int, seconds: float, settle: float, leaving: Leaving | None = None
) -> Window:
    """Run clients that each send the next request once they have their image.

    The clients continue until every request that began inside the window is done, so that the last images of the
    window are generated under the same load as the first.

    Args:
        count: number of clients.
        seconds: duration of the window.
        settle: seconds before the window.
        leaving: decides which clients disconnect early.
    """
    start = time.perf_counter()
    began, ended = start + settle, start + settle + seconds
    replies: list[Reply] = []
    finished = [False] * count
    numbers = iter(range(10**9))

    async def run_client(index: int) -> None:
        while not all(finished):
            number = next(numbers)
            reply = await client.send(number, leave=None if leaving is None else leaving(number))
            replies.append(reply)
            if reply.sent >= ended or reply.ended >= ended:
                finished[index] = True
            if not reply.has_image and reply.status != LEFT:
                await asyncio.sleep(0.05)  # after a refusal

    async with asyncio.TaskGroup() as group:
        for index in range(count):
            group.create_task(run_client(index))
    return Window(tuple(replies), began, ended)


async def open_loop(client: Client, moments: Sequence[float], seconds: float, settle: float) -> Window:
    """Send requests at these moments, whether or not earlier requests are done.

    Args:
        moments: seconds from the start, from 0 to ``settle + seconds``.
        seconds: duration of the window.
        settle: seconds before the window.
    """
    start = time.perf_counter()

    async def send_at(number: int, due: float) -> Reply:
        await asyncio.sleep(due - time.perf_counter())
        return await client.send(number, due)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(send_at(number, start + moment)) for number, moment in enumerate(moments)]
    return Window(tuple(task.result() for task in tasks), start + settle, start + settle + seconds)
