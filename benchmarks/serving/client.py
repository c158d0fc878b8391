"""Clients of an image server: closed loops, in which each waits for its image, and open ones, that do not wait."""

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
"""What the n-th request asks for."""

LEFT, LOST = 0, -1
"""In the place of a status: the client went away before the reply came; the connection failed."""

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Reply:
    """What came of a request; moments are on ``time.perf_counter``.

    Attributes:
        due: when it was to be sent.
        sent, ended: when it was, and when the whole reply was there.
        status: of HTTP; else ``LEFT`` or ``LOST``.
        code: of an error.
        retry_after: whether a refusal says when to come back.
    """

    due: float
    sent: float
    ended: float
    status: int
    code: str | None = None
    retry_after: bool = False

    @property
    def latency(self) -> float:
        """Seconds from the moment at which it was due, so that a client that is late does not flatter the server."""
        return self.ended - self.due

    @property
    def drawn(self) -> bool:
        return self.status == 200


class Client:
    """Sends requests on connections that are kept; a context.

    aiohttp sends them, at half of httpx' cost: what the client takes of a machine, the server beside it lacks.

    Args:
        url: of the server.
        body: of each request.
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

    async def ask(self, number: int, due: float | None = None, leave: float | None = None) -> Reply:
        """The n-th request.

        Args:
            due: when it should be sent; now by default.
            leave: seconds after which the client goes away.

        Raises:
            InternalError: the reply is no image although it says so.
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
    """What happened between two moments, and around.

    Attributes:
        replies: all of them, also those that began before or ended after.
        began, ended: of the measurement.
    """

    replies: tuple[Reply, ...]
    began: float
    ended: float

    @property
    def throughput(self) -> float:
        """Images a second. An image that was under way at an edge counts with the share of its time inside, so that
        batches that end together do not make the figure jump."""
        return sum(self._share(reply) for reply in self.replies if reply.drawn) / (self.ended - self.began)

    @property
    def latencies(self) -> list[float]:
        """Seconds of the images that were asked for inside."""
        return [reply.latency for reply in self.replies if reply.drawn and self.began <= reply.due < self.ended]

    def _share(self, reply: Reply) -> float:
        inside = min(reply.ended, self.ended) - max(reply.sent, self.began)
        return max(inside, 0.0) / (reply.ended - reply.sent)


async def closed(client: Client, count: int, seconds: float, settle: float, leaving: Leaving | None = None) -> Window:
    """So many clients, each of which asks again once it has its image.

    They go on until all that was begun inside the window is done, so that its last images have as much company as its
    first ones.

    Args:
        settle: seconds before the window.
        leaving: which requests are given up by their client.
    """
    start = time.perf_counter()
    began, ended = start + settle, start + settle + seconds
    replies: list[Reply] = []
    waited = [False] * count
    numbers = iter(range(10**9))

    async def one(place: int) -> None:
        while not all(waited):
            number = next(numbers)
            reply = await client.ask(number, leave=None if leaving is None else leaving(number))
            replies.append(reply)
            if reply.sent >= ended or reply.ended >= ended:
                waited[place] = True
            if not reply.drawn and reply.status != LEFT:
                await asyncio.sleep(0.05)  # refused: not at once again

    async with asyncio.TaskGroup() as group:
        for place in range(count):
            group.create_task(one(place))
    return Window(tuple(replies), began, ended)


Leaving = Callable[[int], float | None]
"""After how many seconds the client of the n-th request goes away; None if it waits."""


async def opened(client: Client, moments: Sequence[float], seconds: float, settle: float) -> Window:
    """Requests that come at these seconds, whatever becomes of those before.

    Args:
        moments: from 0 to ``settle + seconds``.
    """
    start = time.perf_counter()

    async def one(number: int, due: float) -> Reply:
        await asyncio.sleep(due - time.perf_counter())
        return await client.ask(number, due)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(one(number, start + moment)) for number, moment in enumerate(moments)]
    return Window(tuple(task.result() for task in tasks), start + settle, start + settle + seconds)
