"""A request on its way, whoever draws it: what it tells as it goes on, and what came of it."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

from ..batching.worker import outcome_of
from .wanted import Wanted


@dataclass(frozen=True)
class Progress:
    """A UNet call that was made.

    Attributes:
        step: its number, from 1.
        total: how many there will be; None where nobody knows.
        kind: ``full``, ``shallow``, or ``skipped`` where no engine ran.
        seconds: since the last one, or since work on the request began.
        rows: of the engine call that others may have shared; 0 where none was made.
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
        timeline: of the UNet calls, ``#`` for a full one, ``.`` for a shallow one, ``_`` where no engine ran.
    """

    images: tuple[str, ...]
    seconds: float
    queue_seconds: float
    timeline: str


class Going(ABC):
    """Made, and used, in the event loop; a context that gives up what is unfinished at its end.

    Args:
        asked: what is drawn.
        closed: called at the end of the context.
    """

    def __init__(self, asked: Wanted, closed: Callable[[Any], None]) -> None:
        self.asked = asked
        self.events: asyncio.Queue[Event | None] = asyncio.Queue()
        """Of the drawing as it goes on, where the client streams, else together at its end; None after the last."""
        self._ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._closed = closed
        self._left = False

    @property
    def outcome(self) -> str:
        """``done``, ``failed``, ``cancelled``, ``expired`` or ``fault``."""
        if not self._ended.done():
            return "cancelled"
        return outcome_of(self._ended.exception())

    @abstractmethod
    async def result(self) -> Drawn:
        """The images, once they are done.

        Raises:
            Exception: what the request came to instead.
        """

    @abstractmethod
    def _stop(self) -> None:
        """Give the request up, unless it has ended."""

    def fail(self, error: Exception) -> None:
        """Tell the client this, whatever becomes of the drawing, and stop that at its next step."""
        self._stop()
        self._end(error)

    def _end(self, outcome: object) -> None:
        """It came to this result or error; what comes later is nobody's."""
        if self._ended.done() or self._left:
            return
        if isinstance(outcome, BaseException):
            self._ended.set_exception(outcome)
        else:
            self._ended.set_result(outcome)
        self.events.put_nowait(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()
        if self._ended.done() and not self._ended.cancelled():
            self._ended.exception()  # whoever went away does not ask for it
        self._left = True
        self._closed(self)
