"""One replica: it owns one device, and a worker for each model that it keeps open."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ....errors import EngineFaultError, InternalError, OffcutError, ReplicaLostError
from ..going import Preview, Progress
from ..model import Model
from ..opening import open_service
from ..schemas import GenerationRequest
from ..service import Service
from .messages import Begun, Description, Failed, Look, Message
from .names import INGRESS
from .plan import Plan

log = logging.getLogger("offcut.server")

_EVERY = 1.0
"""Seconds between words to the ingress."""

_PATIENCE = 10.0
"""Seconds for it to hear them."""


class Opened:
    """A model that is open in this replica. Ray calls ``__del__`` when another one takes its place."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._watching = asyncio.create_task(service.watch(lambda: None))
        self._closing = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Finish what is being drawn, and close the engines. Not in the event loop."""
        with self._closing:
            if self._closed:
                return
            self._closed = True
        worker = self.service.worker
        self.service.stopping = True
        if self.service.fault is None:  # else closing would wait for a thread that may never come back
            worker.drain(self.service.settings.drain)
            worker.close()
            self.service.served.pipe.unet.close()

    def __del__(self) -> None:
        self.close()


class Replica:
    """A Ray Serve deployment; the ingress calls its methods through a handle.

    Args:
        plan: what is served.
        version: of the deployment, so that its own ingress knows it from those that it replaces.
    """

    async def __init__(self, plan: Plan, version: str) -> None:  # type: ignore[misc]  # Ray awaits it
        self._plan, self._version = plan, version
        self._settings = replace(plan.settings, api_key=None)
        self._name = serve.get_replica_context().replica_tag
        self._models: dict[str, Model] = {}
        self._open: WeakValueDictionary[str, Opened] = WeakValueDictionary()  # Ray holds them

        async def load(name: str) -> Opened:
            service = await asyncio.to_thread(open_service, plan.recipes[name], self._settings, name)
            self._models[name] = service.served.model()
            self._open[name] = opened = Opened(service)
            return opened

        self._load = serve.multiplexed(max_num_models_per_replica=plan.loaded)(load)
        for name in reversed(list(plan.recipes)):  # each is tried, and the first ones stay open
            await self._load(name)
        self._telling = asyncio.create_task(self._tell())

    async def draw(self, name: str | None, body: Mapping[str, Any], each_step: bool) -> AsyncIterator[Message]:
        """Draw what a body says; whoever stops reading stops the drawing.

        Args:
            name: of the model; None for the first.
            body: of a ``GenerationRequest``.
            each_step: tell each UNet call as it is made.
        """
        if name is not None and name not in self._plan.recipes:
            # The ingress is of an older version, and about to leave: the next one knows what there is.
            yield Failed(ReplicaLostError("the model was replaced"))
            return
        try:
            opened: Opened = await self._load(name or self._plan.first)
            with opened.service.draw(GenerationRequest.model_validate(body)) as drawing:
                yield Begun(self._name)
                steps: list[Progress] = []
                while (event := await drawing.events.get()) is not None:
                    if isinstance(event, Preview):
                        yield event
                    elif each_step:
                        yield (event,)
                    else:
                        steps.append(event)
                yield tuple(steps)
                yield await drawing.result()
        except EngineFaultError as error:
            log.error("an engine failed: %s", error)
            yield Failed(EngineFaultError("the engine of a replica failed"))
        except OffcutError as error:
            yield Failed(error)
        except Exception:
            log.exception("a request failed")
            yield Failed(InternalError("a replica failed on this request; its log says how"))

    async def describe(self, version: str) -> Description | None:
        """What it is; None if it is of another version."""
        if version != self._version:
            return None
        return Description({name: self._models[name] for name in self._plan.recipes}, self._look())

    def _look(self) -> Look:
        return Look(self._name, {name: each.service.worker.statistics() for name, each in self._opened().items()})

    async def _tell(self) -> None:
        """Let every ingress know how it is, for as long as it lives: a replica whose places are full takes no calls."""
        ingress = serve.get_deployment_handle(INGRESS)
        while True:
            try:
                await ingress.broadcast("hear", self._look()).results_async(timeout_s=_PATIENCE, return_exceptions=True)
            except (RayError, RayServeException, TimeoutError) as error:
                log.info("no ingress hears: %s", error)  # there is none yet, or it is being replaced
            await asyncio.sleep(_EVERY)

    def check_health(self) -> None:
        """Ray asks every few seconds, and puts a new replica in the place of one that raises.

        Raises:
            EngineFaultError: an engine failed, hangs, or has lost its thread.
            InternalError: nobody hears of it any more.
        """
        if self._telling.done():
            raise InternalError("the task that tells how a replica is has ended")
        for name, each in self._opened().items():
            if each.service.fault is not None:
                raise EngineFaultError(f"the engine of {name} is of no use: {each.service.fault}")

    def _opened(self) -> dict[str, Opened]:
        return {name: each for name, each in self._open.items() if not each.service.stopping}
