"""The process that clients reach through Ray's HTTP proxies."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from starlette.types import ASGIApp

from ..app import create_app
from ..offer import log
from .front import Front
from .messages import Description, Look
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
        described = await self._ask(replicas, version)
        self._front = Front(replicas, replace(plan, settings=settings), described.models)
        self._front.hear(described.look)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray after the constructor."""
        return create_app(self._front)

    async def hear(self, look: Look) -> None:
        """A replica says how it is."""
        self._front.hear(look)

    async def drain(self) -> int:
        """Take nothing more; how many requests are unfinished."""
        self._front.stopping = True
        return self._front.unfinished

    async def _ask(self, replicas: Any, version: str) -> Description:
        """What the first replica of this version is. While it starts there may be others, which say None."""
        while True:
            try:
                answer = await replicas.describe.remote(version)
            except (RayError, RayServeException) as error:
                log.info("no replica says what it is: %s", error)
            else:
                if isinstance(answer, Description):
                    return answer
            await asyncio.sleep(_BETWEEN)
