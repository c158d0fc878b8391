"""The ingress: the process behind Ray's HTTP proxies, which checks keys and limits, and queues requests."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from ....errors import QueueFullError, WorkerClosedError
from ...batching import Statistics, Total
from ..app import create_app
from ..metrics import ClusterMetrics, WorkerStatistics
from ..models import ModelInfo
from ..params import resolve_request
from ..schemas import GenerationRequest
from ..service import ImageService, log
from .cluster_plan import ClusterPlan
from .remote import RemoteJob, sender
from .replica import ReplicaDescription, ReplicaStatus

_STATUS_LIFETIME = 15.0
"""Seconds after its last report for which a replica counts as alive; replicas report every second."""

_DESCRIBE_INTERVAL = 0.5
"""Seconds between two attempts to reach a replica of the ingress's own version."""

API_KEY_VARIABLE = "OFFCUT_API_KEY"


class ClusterService(ImageService):
    """A service whose replicas are behind a Ray Serve handle; requests are checked and queued here.

    Args:
        replicas: handle of the replicas.
        plan: plan of the deployment.
        models: models of the replicas by name.
    """

    def __init__(self, replicas: Any, plan: ClusterPlan, models: Mapping[str, ModelInfo]) -> None:
        self.cluster_metrics = ClusterMetrics(self._worker_statistics)
        super().__init__(plan.settings, self.cluster_metrics)
        self._replicas, self._plan, self._models = replicas, plan, models
        self._statuses: dict[str, tuple[float, ReplicaStatus]] = {}
        self._jobs: set[RemoteJob] = set()
        self._queue_waits, self._finished = Total(), dict[str, Total]()

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        return self._models

    @property
    def fault(self) -> str | None:
        """None: Ray replaces a replica that has failed, and the ingress goes on."""
        return None

    @property
    def ready(self) -> bool:
        return not self.stopping and bool(self._live_replicas())

    @property
    def open_jobs(self) -> int:
        """Number of jobs whose client has no complete reply yet."""
        return len(self._jobs)

    def statistics(self) -> Statistics:
        in_flight = sum(job.started is not None for job in self._jobs)
        return Statistics(
            queued=len(self._jobs) - in_flight,
            in_flight=in_flight,
            queue_waits=self._queue_waits,
            requests=dict(self._finished),
        )

    def submit(self, body: GenerationRequest) -> RemoteJob:
        if self.stopping:
            raise WorkerClosedError("the server is shutting down")
        places = len(self._live_replicas()) * self._plan.requests_per_replica
        if len(self._jobs) >= places + self._plan.max_queue:
            raise QueueFullError(
                f"the server has {len(self._jobs)} requests, and its replicas work on {places} at once: try again later"
            )
        name = body.model or self._plan.default_model
        params = resolve_request(body, self._models[name], self.settings, self._plan.workers[name].cache_bytes)
        began = time.monotonic()

        def on_close(job: RemoteJob) -> None:
            self._jobs.discard(job)
            ended = time.monotonic()
            self.metrics.request_seconds.labels(job.outcome).observe(ended - began)
            self._finished[job.outcome] = self._finished.get(job.outcome, Total()).plus(ended - began)
            if job.started is not None:
                self._queue_waits = self._queue_waits.plus(job.started - began)

        sticky = self._plan.loaded < len(self._plan.workers)
        send = sender(self._replicas, body.model, bool(body.stream), sticky)
        job = RemoteJob(send, body, params, self.cluster_metrics, on_close)
        self._jobs.add(job)
        return job

    def on_status(self, status: ReplicaStatus) -> None:
        """Store the state that a replica reports."""
        self._statuses[status.replica] = time.monotonic(), status

    def _live_replicas(self) -> list[ReplicaStatus]:
        now = time.monotonic()
        self._statuses = {
            name: (reported, status)
            for name, (reported, status) in self._statuses.items()
            if now - reported < _STATUS_LIFETIME
        }
        return [status for _, status in self._statuses.values()]

    def _worker_statistics(self) -> WorkerStatistics:
        return {
            (status.replica, model): statistics
            for status in self._live_replicas()
            for model, statistics in status.statistics.items()
        }


class Ingress:
    """A Ray Serve deployment around ``server.app``. It starts when a replica of its own version has started.

    Args:
        replicas: handle of the replicas.
        plan: plan of the deployment.
        version: version of the deployment.
    """

    async def __init__(self, replicas: Any, plan: ClusterPlan, version: str) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = replace(plan.settings, api_key=plan.settings.api_key or os.environ.get(API_KEY_VARIABLE) or None)
        description = await self._describe(replicas, version)
        self._service = ClusterService(replicas, replace(plan, settings=settings), description.models)
        self._service.on_status(description.status)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Return the application; Ray calls this after the constructor."""
        return create_app(self._service)

    async def on_status(self, status: ReplicaStatus) -> None:
        """Store the state that a replica reports."""
        self._service.on_status(status)

    async def drain(self) -> int:
        """Refuse new requests, and return the number of unfinished ones."""
        self._service.stopping = True
        return self._service.open_jobs

    async def _describe(self, replicas: Any, version: str) -> ReplicaDescription:
        """Return the description of the first replica of this version; replicas of other versions return None."""
        while True:
            try:
                description = await replicas.describe.remote(version)
            except (RayError, RayServeException) as error:
                log.info("no replica has returned its description yet: %s", error)
            else:
                if isinstance(description, ReplicaDescription):
                    return description
            await asyncio.sleep(_DESCRIBE_INTERVAL)
