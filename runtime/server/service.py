"""Image services: the interface that the routes call, and its implementation with a worker in this process."""

from __future__ import annotations

import asyncio
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ...errors import EngineFaultError, InternalError, LimitError, UserError, WorkerClosedError
from ..batching import Statistics, Worker
from ..pipeline import load
from ..text_to_image import scheduler_named
from .http import FAULT, INTERNAL, Problem, problem_of
from .jobs import ImageJob, WorkerJob
from .metrics import ServerMetrics
from .models import ModelInfo, ServedModel
from .params import resolve_caching, resolve_request
from .schemas import GenerationRequest
from .settings import ServeSettings, WorkerConfig

log = logging.getLogger("offcut.server")

_POLL_SECONDS = 0.1
"""Seconds between two checks of the worker."""

_STALLED_CALLS = 4
"""An engine counts as stalled after this multiple of the expected duration of its longest call."""

_DELIVERY_SECONDS = 2.0
"""Longest time for clients to read an error before the server ends."""


class ImageService(ABC):
    """Models that generate images for clients, in this process or in replicas.

    Args:
        settings: settings of the server.
        metrics: metrics for ``/metrics``.
    """

    def __init__(self, settings: ServeSettings, metrics: ServerMetrics) -> None:
        self.settings, self.metrics = settings, metrics
        self.started = int(time.time())
        """Unix time at which the service began, in seconds."""
        self.stopping = False
        """Whether new requests are refused; may be set from a signal handler."""

    @property
    @abstractmethod
    def models(self) -> Mapping[str, ModelInfo]:
        """Models by name; the first is for requests that name none."""

    @property
    @abstractmethod
    def fault(self) -> str | None:
        """Reason why the engines have failed; None while they work."""

    @property
    def ready(self) -> bool:
        """Whether requests are accepted."""
        return not self.stopping and self.fault is None

    @abstractmethod
    def statistics(self) -> Statistics:
        """Return the statistics of the service's requests."""

    @abstractmethod
    def submit(self, body: GenerationRequest) -> ImageJob:
        """Check a request and start a job for it, or refuse the request before any work.

        Raises:
            RequestError: the request exceeds a limit, or there is no room.
            EngineFaultError: the engines have failed.
        """

    def problem(self, error: BaseException) -> Problem:
        """Return the problem that the client gets for an error. Count it, and log it if it is the server's fault."""
        problem = problem_of(error, self.statistics())
        if problem is INTERNAL:
            log.error("a request failed", exc_info=error)
        elif problem is FAULT:
            log.error("an engine failed: %s", error)
        self.count_problem(problem)
        return problem

    def count_problem(self, problem: Problem) -> None:
        """Count a problem in the metrics."""
        self.metrics.rejections.labels(problem.code).inc()


class WorkerService(ImageService):
    """A service with one model in a worker of this process.

    Args:
        worker: runs the model's pipeline; the caller closes it.
        model: the model.
        settings: settings of the server.

    Raises:
        UserError: the limits allow no image of the model's default size, or the default schedule does not fit it.
    """

    def __init__(self, worker: Worker, model: ServedModel, settings: ServeSettings) -> None:
        (width, height), limits = model.size, settings.limits
        if width * height > limits.pixels_of(model.size) or width * height * settings.steps > limits.pixel_steps:
            raise UserError(
                f"the limits allow no image of this model's default size, {width}x{height} in {settings.steps} steps: "
                "raise --max-pixels and --max-pixel-steps, or lower --steps"
            )
        if settings.schedule is not None or settings.forecast:
            try:
                resolve_caching(GenerationRequest(prompt="a"), model, settings, settings.steps, settings.guidance)
            except LimitError as error:
                raise UserError(f"the server's default schedule does not fit its default requests: {error}") from error
        super().__init__(settings, ServerMetrics(lambda: {(): worker.statistics()}))
        self.worker, self.model = worker, model
        self._cache_limit = worker.statistics().cache_limit
        self._jobs: set[WorkerJob] = set()
        self.gave_up = False
        """Whether requests were given up at shutdown, so that an engine call may still run."""
        self._longest_call = 0.0
        self._stall_fault: str | None = None
        self._progress: tuple[int, ...] = ()
        self._last_progress_time = time.monotonic()

    @property
    def models(self) -> Mapping[str, ModelInfo]:
        return {self.model.name: self.model}

    @property
    def fault(self) -> str | None:
        return self._stall_fault or self.worker.fault

    @property
    def open_jobs(self) -> int:
        """Number of jobs whose client has no complete reply yet."""
        return len(self._jobs)

    def statistics(self) -> Statistics:
        return self.worker.statistics()

    def submit(self, body: GenerationRequest) -> WorkerJob:
        if self._stall_fault is not None:
            raise EngineFaultError(self._stall_fault)
        if self.stopping:
            raise WorkerClosedError("the server is shutting down")
        self.worker.expect_room()
        params = resolve_request(body, self.model, self.settings, self._cache_limit)
        self._longest_call = max(self._longest_call, params.call_seconds)
        began = time.monotonic()

        def on_close(job: WorkerJob) -> None:
            self._jobs.discard(job)
            self.metrics.request_seconds.labels(job.outcome).observe(time.monotonic() - began)

        job = WorkerJob(self.worker, params, self.metrics, on_close)
        self._jobs.add(job)
        return job

    async def watch(self, request_exit: Callable[[], None]) -> None:
        """Watch the worker until the server should end, then call ``request_exit`` once.

        After a signal, requests in flight may finish. After a fault they fail, and readiness reports 503 for
        ``ServeSettings.linger`` seconds.
        """
        stopped: float | None = None
        while True:
            await asyncio.sleep(_POLL_SECONDS)
            now = time.monotonic()
            self._check_progress(now)
            if self.fault is not None:
                self._fail_all(EngineFaultError(self.fault))
                await asyncio.sleep(self.settings.linger)
                break
            if not self.stopping:
                continue
            if stopped is None:
                stopped = now
                self.worker.drain(0)
            if self._idle():
                break
            if now - stopped > self.settings.drain:
                self.gave_up = True
                self._fail_all(WorkerClosedError("the server was shut down before the request was done"))
                log.warning("requests in flight were given up %g s after the signal", self.settings.drain)
                await self._wait_for_delivery()
                break
        request_exit()

    async def _wait_for_delivery(self) -> None:
        """Wait until every client has its reply, but not longer than ``_DELIVERY_SECONDS``."""
        deadline = time.monotonic() + _DELIVERY_SECONDS
        while self._jobs and time.monotonic() < deadline:
            await asyncio.sleep(_POLL_SECONDS)

    def _idle(self) -> bool:
        statistics = self.worker.statistics()
        return not (self._jobs or statistics.queued or statistics.in_flight)

    def _fail_all(self, error: UserError | InternalError) -> None:
        for job in self._jobs:
            job.fail(type(error)(str(error)))

    def _check_progress(self, now: float) -> None:
        """Set a fault if requests in flight make no progress for too long: an engine that hangs raises no error."""
        statistics = self.worker.statistics()
        progress = _progress_counts(statistics)
        if not self._jobs and not statistics.in_flight:
            self._longest_call = 0.0
        bound = max(self.settings.stall, _STALLED_CALLS * self._longest_call)
        if progress != self._progress or not statistics.in_flight:
            self._progress, self._last_progress_time = progress, now
        elif now - self._last_progress_time > bound and self._stall_fault is None:
            self._stall_fault = f"no progress for {bound:g} s although requests are in flight"


def open_service(
    config: WorkerConfig,
    settings: ServeSettings,
    name: str,
    bundle: Bundle | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> WorkerService:
    """Open a bundle, warm its engines up and start a worker on them.

    Args:
        name: model name for clients.
        bundle: the bundle of ``config`` if it is open already; None opens it.
        on_stage: called with the name of each stage as it begins.

    Raises:
        UserError: the bundle does not open, or an option or a setting does not fit it.
    """
    if bundle is None:
        bundle = config.open_bundle()
    engine = bundle.choose_engine(config.engine, config.device).name
    on_stage("load the bundle")
    pipe = load(bundle, engine, device=config.device, provider=config.provider, threads=config.threads)
    if config.sampler is not None:
        pipe.scheduler = scheduler_named(pipe.scheduler, config.sampler)
    model = ServedModel.from_bundle(pipe, bundle, engine, config.device, name)
    for path, scale in config.loras:
        on_stage(f"load the LoRA {Path(path).name} at {scale:g}")
        pipe.unet.load_lora(path, scale)
    on_stage("generate one image to warm up")
    model.warm_up(settings.guidance)
    worker = Worker(
        pipe,
        max_in_flight=config.max_in_flight,
        max_queue=config.max_queue,
        cache_bytes=config.cache_bytes,
        max_batch=config.max_batch,
    )
    return WorkerService(worker, model, settings)


def _progress_counts(statistics: Statistics) -> tuple[int, ...]:
    calls = sum(total.count for total in statistics.ticks.values())
    return calls, statistics.queue_waits.count, sum(total.count for total in statistics.requests.values())
