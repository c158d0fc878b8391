"""The process that clients reach through Ray's HTTP proxies."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from ....errors import InternalError
from ..app import create_app
from ..model import Model
from .front import Front
from .plan import Plan

_BETWEEN = 0.5
"""Seconds between questions for the first replica of its version."""

KEY = "OFFCUT_API_KEY"


class Ingress:
    """A Ray Serve deployment around ``server.app``. It is up when a replica of its own version is.

    Args:
        replicas: a handle of theirs.
        plan: what they serve.
        version: of the deployment.
    """

    async def __init__(self, replicas: Any, plan: Plan, version: str) -> None:  # type: ignore[misc]  # Ray awaits it
        settings = replace(plan.settings, api_key=plan.settings.api_key or os.environ.get(KEY) or None)
        models = await self._ask(replicas, version)
        self._front = Front(replicas, replace(plan, settings=settings), models)
        await self._front.look()
        self._watching = asyncio.create_task(self._front.watch())

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray after the constructor."""
        return create_app(self._front)

    def check_health(self) -> None:
        """Raise if nobody looks after the replicas any more."""
        if self._watching.done():
            raise InternalError("the watch over the replicas has ended")

    async def drain(self) -> int:
        """Take nothing more; how many requests are unfinished."""
        self._front.stopping = True
        return self._front.unfinished

    async def _ask(self, replicas: Any, version: str) -> Mapping[str, Model]:
        """What the models of this version can draw. While the first replica starts, those of others say None."""
        while True:
            try:
                answers = await replicas.broadcast("describe", version).results_async(return_exceptions=True)
            except (RayError, RayServeException):
                answers = []  # there is none yet
            for answer in answers:
                if isinstance(answer, Mapping):
                    return answer
            await asyncio.sleep(_BETWEEN)
