"""Replicas: each owns one device, and a worker for each model that it keeps open."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakValueDictionary

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ....errors import EngineFaultError, InternalError, OffcutError, ReplicaLostError
from ...batching import Statistics
from ..jobs import Preview, Progress
from ..models import ModelInfo
from ..schemas import GenerationRequest
from ..service import WorkerService, open_service
from .cluster_plan import INGRESS, ClusterPlan
from .remote import JobFailed, JobStarted, Message

log = logging.getLogger("offcut.server")

_REPORT_INTERVAL = 1.0
"""Seconds between two status reports to the ingress."""

_REPORT_TIMEOUT = 10.0
"""Seconds for the ingress to receive a status report."""


@dataclass(frozen=True)
class ReplicaStatus:
    """State of a replica at one moment.

    Attributes:
        replica: name of the replica.
        statistics: worker statistics of each model that is open.
    """

    replica: str
    statistics: Mapping[str, Statistics]


@dataclass(frozen=True)
class ReplicaDescription:
    """Models of a replica, and its state.

    Attributes:
        models: all models by name, the default first.
        status: state of the replica.
    """

    models: Mapping[str, ModelInfo]
    status: ReplicaStatus


class OpenModel:
    """A model that is open in this replica. Ray calls ``__del__`` when another model takes its place."""

    def __init__(self, service: WorkerService) -> None:
        self.service = service
        self._watch_task = asyncio.create_task(service.watch(lambda: None))
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Finish the jobs in flight and close the engines. Blocks, so do not call it in the event loop."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        worker = self.service.worker
        self.service.stopping = True
        if self.service.fault is None:  # after a fault, closing would wait for a thread that may never return
            worker.drain(self.service.settings.drain)
            worker.close()
            self.service.model.pipe.unet.close()

    def __del__(self) -> None:
        self.close()


class Replica:
    """A Ray Serve deployment whose methods the ingress calls through a handle.

    Args:
        plan: plan of the deployment.
        version: version of the deployment; the ingress waits for a replica of its own version.
    """

    async def __init__(self, plan: ClusterPlan, version: str) -> None:  # type: ignore[misc]  # Ray awaits it
        self._plan, self._version = plan, version
        self._settings = replace(plan.settings, api_key=None)
        self._name = serve.get_replica_context().replica_tag
        self._models: dict[str, ModelInfo] = {}
        self._open: WeakValueDictionary[str, OpenModel] = WeakValueDictionary()  # Ray holds the references

        async def load(name: str) -> OpenModel:
            service = await asyncio.to_thread(open_service, plan.workers[name], self._settings, name)
            self._models[name] = service.model.info()
            self._open[name] = model = OpenModel(service)
            return model

        self._load = serve.multiplexed(max_num_models_per_replica=plan.loaded)(load)
        # Every model is opened once, so that faults show now. The first models are opened last, and stay open.
        for name in reversed(list(plan.workers)):
            await self._load(name)
        self._report_task = asyncio.create_task(self._report())

    async def generate(self, name: str | None, body: Mapping[str, Any], each_step: bool) -> AsyncIterator[Message]:
        """Generate the images of a request. Closing the generator cancels the work.

        Args:
            name: name of the model; None for the default.
            body: body of a ``GenerationRequest``.
            each_step: whether to send each UNet call as it completes, instead of all together at the end.
        """
        if name is not None and name not in self._plan.workers:
            # An ingress of the previous version sent this. The client gets 503; the next ingress knows the new models.
            yield JobFailed(ReplicaLostError("the model was replaced"))
            return
        try:
            model: OpenModel = await self._load(name or self._plan.default_model)
            with model.service.submit(GenerationRequest.model_validate(body)) as job:
                yield JobStarted(self._name)
                steps: list[Progress] = []
                while (event := await job.events.get()) is not None:
                    if isinstance(event, Preview):
                        yield event
                    elif each_step:
                        yield (event,)
                    else:
                        steps.append(event)
                yield tuple(steps)
                yield await job.result()
        except EngineFaultError as error:
            log.error("an engine failed: %s", error)
            yield JobFailed(EngineFaultError("the engine of a replica failed"))
        except OffcutError as error:
            yield JobFailed(error)
        except Exception:
            log.exception("a request failed")
            yield JobFailed(InternalError("a replica failed on this request; its log has the reason"))

    async def describe(self, version: str) -> ReplicaDescription | None:
        """Return the models and the state; None if the replica is of another version."""
        if version != self._version:
            return None
        return ReplicaDescription({name: self._models[name] for name in self._plan.workers}, self._status())

    def _status(self) -> ReplicaStatus:
        statistics = {name: model.service.worker.statistics() for name, model in self._open_models().items()}
        return ReplicaStatus(self._name, statistics)

    async def _report(self) -> None:
        """Report the state to every ingress, as long as the replica lives.

        The replica calls the ingress and not the reverse: a replica whose places are full accepts no calls.
        """
        ingress = serve.get_deployment_handle(INGRESS)
        while True:
            try:
                await ingress.broadcast("on_status", self._status()).results_async(
                    timeout_s=_REPORT_TIMEOUT, return_exceptions=True
                )
            except (RayError, RayServeException, TimeoutError) as error:
                log.info("no ingress received the status: %s", error)  # none has started yet, or it is being replaced
            await asyncio.sleep(_REPORT_INTERVAL)

    def check_health(self) -> None:
        """Check the engines. Ray calls this every few seconds and replaces a replica that raises.

        Raises:
            EngineFaultError: an engine failed, hangs, or has lost its thread.
            InternalError: the task that reports the state has ended.
        """
        if self._report_task.done():
            raise InternalError("the task that reports a replica's state has ended")
        for name, model in self._open_models().items():
            if model.service.fault is not None:
                raise EngineFaultError(f"the engine of {name} has failed: {model.service.fault}")

    def _open_models(self) -> dict[str, OpenModel]:
        return {name: model for name, model in self._open.items() if not model.service.stopping}
