"""A cluster of this machine's own, from its start to a signal."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from ..run import listen as free_socket
from .connect import address, connected, listen
from .deploy import deploy
from .names import APP
from .plan import Plan

log = logging.getLogger("offcut.server")

_ASK = 0.2
"""Seconds between looks at what is unfinished, or for a signal."""


def run(plan: Plan, host: str, port: int, on_listening: Callable[[int, str], None]) -> None:
    """Serve on this machine until a signal; requests in flight may then finish. A second signal does not wait.

    Args:
        on_listening: called with the port and the cluster's address once requests are taken.

    Raises:
        UserError: the address cannot be had, or what is planned does not fit.
    """
    with free_socket(host, port) as taken:  # Ray's proxy cannot say which port it chose, or that it has none
        bound = taken.getsockname()[1]
    scale = plan.scale
    wanted = scale.most * (1 + scale.surge / 100)
    with connected(None, cpus=wanted * scale.cpus, gpus=scale.most * scale.gpus):
        from ray import serve

        listen(host, bound, everywhere=False)
        deploy(plan)
        with _signals() as signals:
            on_listening(bound, address())
            signals.acquire()
            if _drain(plan.settings.drain, signals):
                serve.delete(APP)  # which lets the last replies reach their clients


def _drain(seconds: float, signals: threading.Semaphore) -> bool:
    """Take nothing more; whether all that was taken is done within these seconds and before the next signal."""
    from ray import serve

    ingress, deadline = serve.get_app_handle(APP), time.monotonic() + seconds
    while any(ingress.broadcast("drain").results(timeout_s=seconds)):
        if time.monotonic() > deadline:
            log.warning("requests in flight were given up %g s after the signal", seconds)
            return False
        if signals.acquire(timeout=_ASK):
            return False
    return True


@contextlib.contextmanager
def _signals() -> Iterator[threading.Semaphore]:
    """Released once for each SIGTERM or SIGINT, instead of what they do otherwise."""
    seen = threading.Semaphore(0)

    def count(number: int, frame: FrameType | None) -> None:
        seen.release()

    before = {number: signal.signal(number, count) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
