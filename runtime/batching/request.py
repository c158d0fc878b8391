"""A request on its way through a worker, and what its sender holds of it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from .lanes import Lane
from .pool import Layout, Slot

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Step:
    """A UNet call of a request that has completed.

    Attributes:
        call: its index, from 0.
        calls: how many the request makes; None where nobody knows.
        full: whether the full graph ran.
        rows: of the engine call that it shared, without padding; 0 where no engine ran.
    """

    call: int
    calls: int | None
    full: bool
    rows: int


OnStep = Callable[[Step], None]


@dataclass(eq=False)
class Request:
    """What a worker knows of a request.

    Attributes:
        key: in the order of submission.
        arguments: of the pipeline call.
        pipeline: the class of diffusers that is called; None for the worker's own.
        scheduler: to be copied; None for the pipeline's own.
        submitted, expires, due: on ``time.monotonic``; ``expires`` is None without a deadline, ``due`` orders requests.
        slot: holds its cached features.
        written: the number of the full step whose features the slot holds.
        before: of the full step before that, whose features it holds too where there is a forecast; None for none.
    """

    key: int
    arguments: Mapping[str, Any]
    schedule: Schedule | None
    cut: str | None
    forecast: Forecast | None
    scheduler: Any
    pipeline: type | None
    submitted: float
    expires: float | None
    due: float
    on_step: OnStep | None
    future: Future[Any] = field(default_factory=Future)
    started: float | None = None
    """When a thread took it, on ``time.monotonic``."""
    slot: Slot | None = None
    written: int = -1
    before: int | None = None
    ended: Exception | None = None
    """Why it is to stop at its next step: cancelled, or its deadline passed."""


@dataclass(eq=False)
class Call:
    """A UNet call of a request that waits for the engines.

    Attributes:
        tensors: the engines' inputs, without the timestep.
        timestep: as the engines take it, for the request's rows.
        rows: of its batch.
        cut: None for a full call.
        number: of the call in its request, from 0.
        layout: of the features that a full call leaves behind; None if no shallow call follows, or this is one.
        last: no call follows.
        until_full: see ``policy.Waiting``.
    """

    request: Request
    lane: Lane
    tensors: Mapping[str, torch.Tensor]
    timestep: torch.Tensor
    rows: int
    cut: str | None
    number: int
    layout: Layout | None
    last: bool
    until_full: int | None
    came: float
    passed: int = 0
    shared: int = 0
    """Rows of the engine call, once it was made."""
    answer: torch.Tensor | Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Ticket:
    """What the sender of a request holds.

    Attributes:
        key: the request's number.
        future: of the pipeline's output. Its exception is a ``RequestError`` for what a worker refuses, an
            ``EngineFaultError`` if the engines failed, else what the pipeline itself raised.
    """

    def __init__(self, request: Request, cancel: Callable[[Request], None]) -> None:
        self.key = request.key
        self.future = request.future
        self._request, self._cancel = request, cancel

    @property
    def started(self) -> float | None:
        """When work on the request began, on ``time.monotonic``; None while it waits in the queue."""
        return self._request.started

    def cancel(self) -> None:
        """Stop the request: at once if it waits, else at its next step. The future raises ``RequestCancelledError``.

        What it holds is free within one step. After the last step it has no effect.
        """
        self._cancel(self._request)
