"""What the ingress offers: limits, queue and deadlines here, drawing in replicas."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from ....errors import QueueFullError, WorkerClosedError
from ...batching import Statistics, Total
from ..metrics import Workers
from ..model import Model
from ..offer import Offer
from ..schemas import GenerationRequest
from ..wanted import wanted
from .messages import Look
from .metrics import ClusterMetrics
from .plan import Plan
from .remote import RemoteDrawing
from .send import sender

_FRESH = 15.0
"""Seconds for which a replica counts that is not heard of; it says a word every second."""


class Front(Offer):
    """Replicas behind a handle of Ray Serve.

    Args:
        replicas: the handle.
        plan: what they serve.
        models: what they can draw.
    """

    def __init__(self, replicas: Any, plan: Plan, models: Mapping[str, Model]) -> None:
        self.cluster_metrics = ClusterMetrics(self._workers)
        super().__init__(plan.settings, self.cluster_metrics)
        self._replicas, self._plan, self._models = replicas, plan, models
        self._heard: dict[str, tuple[float, Look]] = {}
        self._open: set[RemoteDrawing] = set()
        self._queue_waits, self._ended = Total(), dict[str, Total]()

    @property
    def models(self) -> Mapping[str, Model]:
        return self._models

    @property
    def fault(self) -> str | None:
        """None: a replica that is of no use is Ray's to replace, and the ingress goes on."""
        return None

    @property
    def ready(self) -> bool:
        return not self.stopping and bool(self._looks())

    @property
    def unfinished(self) -> int:
        """Requests that it has taken and not answered."""
        return len(self._open)

    def statistics(self) -> Statistics:
        """Of the requests that it has, and had."""
        begun = sum(drawing.begun is not None for drawing in self._open)
        return Statistics(
            queued=len(self._open) - begun,
            in_flight=begun,
            queue_waits=self._queue_waits,
            requests=dict(self._ended),
        )

    def draw(self, body: GenerationRequest) -> RemoteDrawing:
        if self.stopping:
            raise WorkerClosedError("the server is shutting down")
        places = len(self._looks()) * self._plan.places
        if len(self._open) >= places + self._plan.max_queue:
            raise QueueFullError(
                f"{len(self._open)} requests are here already, and replicas work on {places} at once: try again later"
            )
        name = body.model or self._plan.first
        asked = wanted(body, self._models[name], self.settings, self._plan.recipes[name].cache_bytes)
        began = time.monotonic()

        def closed(drawing: RemoteDrawing) -> None:
            self._open.discard(drawing)
            ended = time.monotonic()
            self.metrics.request_seconds.labels(drawing.outcome).observe(ended - began)
            self._ended[drawing.outcome] = self._ended.get(drawing.outcome, Total()).plus(ended - began)
            if drawing.begun is not None:
                self._queue_waits = self._queue_waits.plus(drawing.begun - began)

        sticky = self._plan.loaded < len(self._plan.recipes)
        send = sender(self._replicas, body.model, bool(body.stream), sticky)
        drawing = RemoteDrawing(send, body, asked, self.cluster_metrics, closed)
        self._open.add(drawing)
        return drawing

    def hear(self, look: Look) -> None:
        """A replica says how it is."""
        self._heard[look.replica] = time.monotonic(), look

    def _looks(self) -> list[Look]:
        now = time.monotonic()
        self._heard = {name: (when, look) for name, (when, look) in self._heard.items() if now - when < _FRESH}
        return [look for _, look in self._heard.values()]

    def _workers(self) -> Workers:
        return {(look.replica, name): each for look in self._looks() for name, each in look.statistics.items()}
