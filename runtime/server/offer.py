"""What the routes of a server need, whoever draws: a worker in this process, or replicas elsewhere."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping

from ..batching import Statistics
from .going import Going
from .metrics import Metrics
from .model import Model
from .problems import FAULT, INTERNAL, Problem, problem_of
from .schemas import GenerationRequest
from .settings import Settings

log = logging.getLogger("offcut.server")


class Offer(ABC):
    """Models that clients may ask for.

    Args:
        settings: of the server.
        metrics: that it shows.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started = int(time.time())
        self.stopping = False
        """Whether nothing more is taken; may be set from a signal handler."""

    @property
    @abstractmethod
    def models(self) -> Mapping[str, Model]:
        """By name; the first is for requests that name none."""

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Why the engines are of no use; None while they work."""

    @property
    def ready(self) -> bool:
        """Whether requests are taken."""
        return not self.stopping and self.fault is None

    @abstractmethod
    def statistics(self) -> Statistics:
        """Of its requests at this moment."""

    @abstractmethod
    def draw(self, body: GenerationRequest) -> Going:
        """Ask for what a body says; a place is reserved before any work.

        Raises:
            RequestError: it asks for too much, or there is no room.
            EngineFaultError: the engines do not work.
        """

    async def measured(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return self.metrics.text()

    def problem(self, error: BaseException) -> Problem:
        """What to tell a client of an error, which is counted, and logged where it is the server's own."""
        told = problem_of(error, self.statistics())
        if told is INTERNAL:
            log.error("a request failed", exc_info=error)
        elif told is FAULT:
            log.error("an engine failed: %s", error)
        self.refused(told)
        return told

    def refused(self, problem: Problem) -> None:
        """Count it."""
        self.metrics.rejections.labels(problem.code).inc()
