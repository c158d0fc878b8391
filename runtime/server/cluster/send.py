"""One try of a request at one replica, as a stream of messages."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from ..going import Drawn
from .messages import Failed, Message

Send = Callable[[Mapping[str, Any]], AsyncGenerator[Message]]
"""Takes a body; whoever closes the stream stops the drawing."""


def sender(replicas: Any, name: str | None, each_step: bool, sticky: bool) -> Send:
    """Tries through a handle of Ray Serve, which chooses the replica and waits until one has a place.

    Args:
        replicas: the handle.
        name: of the model; None for the first.
        each_step: whether steps come one by one.
        sticky: whether replicas that have the model open are preferred.
    """
    options = {"multiplexed_model_id": name} if sticky and name is not None else {}
    draw = replicas.options(stream=True, method_name="draw", **options)

    async def send(body: Mapping[str, Any]) -> AsyncGenerator[Message]:
        response = draw.remote(name, body, each_step)
        ended = False
        try:
            async for message in response:
                ended = isinstance(message, Drawn | Failed)
                yield message
        finally:
            if not ended:
                response.cancel()

    return send
