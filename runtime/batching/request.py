"""A request of a worker, the calls that it makes, and the ticket that its sender holds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..generation.features import CachedFeatures, CallPart
from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from .lanes import Lane
from .pool import Layout, Slot

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Step:
    """A completed UNet call of a request.

    Attributes:
        call: index of the call, from 0.
        calls: number of calls of the request; None if it is unknown.
        full: whether the full graph ran.
        rows: number of rows of the shared engine call, without padding; 0 if no engine ran.
    """

    call: int
    calls: int | None
    full: bool
    rows: int


OnStep = Callable[[Step], None]


@dataclass(eq=False)
class WorkerRequest:
    """State of a request in a worker.

    Attributes:
        key: number of the request, in order of submission.
        arguments: arguments of the pipeline call.
        scheduler: diffusers scheduler, which is copied; None for the pipeline's own.
        pipeline: diffusers pipeline class; None for that of the worker's pipeline.
        submitted: time of submission, on ``time.monotonic``.
        expires: time at which the request is given up, on ``time.monotonic``; None without a deadline.
        due: time by which requests are ordered, on ``time.monotonic``.
        slots: memory for the cached features of its trajectories.
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
    reuse_guidance: bool = False
    future: Future[Any] = field(default_factory=Future)
    started: float | None = None
    """Time at which a request runner took the request, on ``time.monotonic``."""
    slots: dict[CachedFeatures, Slot] = field(default_factory=dict)
    stop_error: Exception | None = None
    """Error that the request's next call raises: the request was cancelled, or its deadline passed."""


@dataclass(eq=False)
class UNetCall:
    """A UNet call of a request, which waits for the engines.

    Attributes:
        tensors: inputs of the engines, without the timestep.
        timestep: timestep input of the engines for the rows of this call.
        part: features of the call's trajectory, index of the call in it, and batch size.
        cut: cut of a shallow call; None for a full call.
        layout: features to keep after a full call; None for a shallow call, or if no shallow call follows.
        last: whether the trajectory makes no engine call after this one.
        arrived: time at which the call began to wait, on ``time.monotonic``.
        passed_over: number of engine calls made while this call waited.
    """

    request: WorkerRequest
    lane: Lane
    tensors: Mapping[str, torch.Tensor]
    timestep: torch.Tensor
    part: CallPart
    cut: str | None
    layout: Layout | None
    last: bool
    arrived: float
    passed_over: int = 0
    shared_rows: int = 0
    """Number of rows of the shared engine call, once it was made."""
    result: torch.Tensor | Exception | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Ticket:
    """Handle of a submitted request.

    Attributes:
        key: number of the request.
        future: future of the pipeline's output. Its exception is a ``RequestError`` if the worker stopped the request,
            an ``EngineFaultError`` if the engines failed, otherwise what the pipeline raised.
    """

    def __init__(self, request: WorkerRequest, cancel: Callable[[WorkerRequest], None]) -> None:
        self.key = request.key
        self.future = request.future
        self._request, self._cancel = request, cancel

    @property
    def started(self) -> float | None:
        """Time at which work on the request began, on ``time.monotonic``; None while it is queued."""
        return self._request.started

    def cancel(self) -> None:
        """Stop the request: at once if it waits, otherwise at its next step. The future raises
        ``RequestCancelledError``.

        The memory of the request is free within one step. After the last step this method has no effect.
        """
        self._cancel(self._request)
