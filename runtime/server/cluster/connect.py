"""To a cluster that there is, or to one of this machine's own."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager

from ....errors import UserError

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}
"""Nothing is reported to anybody."""

_ALONE = {
    # The switch is named after the systems where it is off: all of a node's processes then listen on 127.0.0.1 alone,
    # and not on every address that the machine has.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",  # Ray's own, in ~/.ray
}
_LOOPBACK = "127.0.0.1:"

_OBJECTS = 2**28
"""Bytes for what processes send to one another: images and requests."""


@contextmanager
def connected(address: str | None, *, cpus: float = 0, gpus: float = 0) -> Iterator[None]:
    """This process is part of a cluster meanwhile.

    Args:
        address: of a cluster, as Ray takes it, or ``auto`` for the one on this machine; None starts one that ends with
            this process and that only this machine reaches.
        cpus, gpus: that a cluster of its own has at least; it takes this machine's, if they are more.

    Raises:
        UserError: there is no cluster at the address.
    """
    if address == "auto":
        address = _on_this_machine()
    alone = address is None or address.startswith(_LOOPBACK)
    for name, value in (_QUIET | _ALONE if alone else _QUIET).items():
        os.environ.setdefault(name, value)  # before Ray is imported, which reads them once
    if address is not None:
        os.environ["RAY_ADDRESS"] = address  # Ray would rather have another one that stands there
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"there is no Ray cluster at {address}: start one, or leave the address out") from error
    else:
        sizes = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        if gpus:
            sizes["num_gpus"] = max(_gpus(), math.ceil(gpus))
        ray.init(address="local", include_dashboard=False, object_store_memory=_OBJECTS, **sizes, **quiet)
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)  # Ray sets its level anew
    try:
        yield
    finally:
        ray.shutdown()


def listen(host: str, port: int, *, everywhere: bool) -> None:
    """Start Ray's HTTP proxies, unless the cluster has some.

    Args:
        everywhere: on every machine of the cluster that has a replica, not on the first one alone.
    """
    from ray import serve

    serve.start(
        proxy_location="EveryNode" if everywhere else "HeadOnly",
        http_options={"host": host, "port": port, "keep_alive_timeout_s": 30},
    )


def address() -> str:
    """Of the cluster that this process is part of, for others on this machine."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _on_this_machine() -> str:
    """The address of the one cluster that this machine has a node of."""
    import psutil

    found: set[str] = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = [word for line in process.info["cmdline"] or () for word in line.split()]
            found |= {word.partition("=")[2] for word in words if word.startswith("--gcs-address=")}
    if len(found) != 1:
        there = f"{len(found)} ({', '.join(sorted(found))})" if found else "none"
        raise UserError(f"this machine should be in one Ray cluster, but is in {there}: name it with --ray-address")
    return found.pop()


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
