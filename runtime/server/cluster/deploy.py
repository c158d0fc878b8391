"""Deployment of a plan: connection to a Ray cluster, the deployments, and a local cluster in the foreground."""

from __future__ import annotations

import logging
import math
import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from ....errors import EngineError, UserError
from ..run import listen
from .cluster_plan import APP, INGRESS, REPLICA, ClusterPlan, ReplicaScale

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("offcut.server")

_SHUTDOWN_MARGIN = 5.0
"""Seconds that a replica has to end after its last request's deadline."""

_POLL_SECONDS = 0.2
"""Seconds between two checks for unfinished requests and signals."""

_NO_TELEMETRY = {"RAY_USAGE_STATS_ENABLED": "0"}

_LOCAL_ONLY = {
    # With 0, all processes of a node listen on 127.0.0.1 only, instead of on every address of the machine. Ray names
    # the variable after the systems where 0 is the default.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "token",  # Ray's own token, in ~/.ray
}
_LOOPBACK_PREFIX = "127.0.0.1:"

_OBJECT_STORE_BYTES = 2**28
"""Shared memory for the objects that processes send to one another: images and requests."""


def application(document: Mapping[str, Any]) -> Application:
    """Return the Ray Serve application for a plan's document. Config files name this function as ``import_path``."""
    return bind(ClusterPlan.from_document(document))


def bind(plan: ClusterPlan) -> Application:
    """Return an ingress bound to replicas; a random version marks the two deployments as belonging together."""
    from ray import serve

    from .ingress import Ingress
    from .replica import Replica

    version, scale = secrets.token_hex(8), plan.scale
    # Ray may kill a replica that shuts down only after the deadlines of its jobs.
    shutdown = {
        "graceful_shutdown_timeout_s": plan.settings.timeout + _SHUTDOWN_MARGIN,
        "graceful_shutdown_wait_loop_s": 0.5,
    }
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=plan.requests_per_replica,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=3,
        max_surge_percent=scale.surge,
        **_replica_count(scale, plan.requests_per_replica),
        **shutdown,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,  # the ingress's own limits come first
        max_surge_percent=100,  # an update starts the new ingress before the old one ends
        **shutdown,
    )
    return ingress.bind(replica.bind(plan, version), plan, version)


def _replica_count(scale: ReplicaScale, requests_per_replica: int) -> dict[str, Any]:
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": {
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "target_ongoing_requests": requests_per_replica,  # further requests wait until Ray adds a replica
            "upscale_delay_s": scale.up_seconds,
            "downscale_delay_s": scale.down_seconds,
        }
    }


def deploy(plan: ClusterPlan) -> None:
    """Deploy a plan on the connected cluster, replacing what runs there, and return when it is up.

    Raises:
        EngineError: no replica started. Replicas of the previous deployment that still run go on.
    """
    from ray import serve

    try:
        serve.run(bind(plan), name=APP, route_prefix="/")
    except RuntimeError as error:  # the only exception that Ray raises for a failed deployment
        raise EngineError(f"the cluster could not deploy the plan: {_last_line(str(error))}") from error


def check_running() -> None:
    """Check that the connected cluster runs offcut.

    Raises:
        UserError: there is nothing to update.
    """
    from ray import serve

    if APP not in serve.status().applications:
        raise UserError("offcut does not run on this cluster: leave --update out")


def _last_line(traceback: str) -> str:
    """Return the last line of a deployment's traceback, which names the cause."""
    lines = [line.strip() for line in traceback.splitlines() if line.strip()]
    return lines[-1] if lines else "Ray gives no reason"


@contextmanager
def connected(address: str | None, *, cpus: float = 0, gpus: float = 0) -> Iterator[None]:
    """Connect this process to a Ray cluster for the duration of the context.

    Args:
        address: address of a cluster as Ray takes it, or ``auto`` for the one on this machine. None starts a cluster
            that ends with this process and that only this machine reaches.
        cpus, gpus: minimum number of CPUs and GPUs of a cluster that is started; it has at least those of this machine.

    Raises:
        UserError: there is no cluster at the address.
    """
    if address == "auto":
        address = _local_cluster_address()
    local = address is None or address.startswith(_LOOPBACK_PREFIX)
    for name, value in (_NO_TELEMETRY | _LOCAL_ONLY if local else _NO_TELEMETRY).items():
        os.environ.setdefault(name, value)  # before the import of Ray, which reads the variables once
    if address is not None:
        os.environ["RAY_ADDRESS"] = address  # Ray prefers this variable to the argument of `init`
    import ray

    quiet = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"there is no Ray cluster at {address}: start one, or leave the address out") from error
    else:
        resources = {"num_cpus": max(os.cpu_count() or 1, math.ceil(cpus))}
        if gpus:
            resources["num_gpus"] = max(_gpu_count(), math.ceil(gpus))
        ray.init(
            address="local", include_dashboard=False, object_store_memory=_OBJECT_STORE_BYTES, **resources, **quiet
        )
    # A filter, because Ray resets the logger's level.
    logging.getLogger("ray.serve").addFilter(lambda record: record.levelno >= logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()


def start_proxies(host: str, port: int, *, everywhere: bool) -> None:
    """Start Ray's HTTP proxies, unless the cluster has some.

    Args:
        everywhere: start one on every machine that has a replica, not on the head node alone.
    """
    from ray import serve

    serve.start(
        proxy_location="EveryNode" if everywhere else "HeadOnly",
        http_options={"host": host, "port": port, "keep_alive_timeout_s": 30},
    )


def run_foreground(plan: ClusterPlan, host: str, port: int, on_listening: Callable[[int, str], None]) -> None:
    """Start a cluster on this machine, and serve on it until a signal.

    Requests in flight may finish after the first signal; a second signal ends them.

    Args:
        on_listening: called with the port and the cluster's address once requests are accepted.

    Raises:
        UserError: the address cannot be bound, or the plan does not fit.
    """
    # Ray's proxy does not report the port that it chose, nor that the port is in use.
    with listen(host, port) as listener:
        free_port = listener.getsockname()[1]
    scale = plan.scale
    replicas = scale.most * (1 + scale.surge / 100)
    with connected(None, cpus=replicas * scale.cpus, gpus=scale.most * scale.gpus):
        import ray
        from ray import serve

        start_proxies(host, free_port, everywhere=False)
        deploy(plan)
        with _count_signals() as signals:
            on_listening(free_port, str(ray.get_runtime_context().gcs_address))
            signals.acquire()
            if _drain(plan.settings.drain, signals):
                serve.delete(APP)  # lets the last replies reach their clients


def _drain(seconds: float, signals: threading.Semaphore) -> bool:
    """Refuse new requests. Return whether the others end within this time and before the next signal."""
    from ray import serve

    ingress, deadline = serve.get_app_handle(APP), time.monotonic() + seconds
    while any(ingress.broadcast("drain").results(timeout_s=seconds)):
        if time.monotonic() > deadline:
            log.warning("requests in flight were given up %g s after the signal", seconds)
            return False
        if signals.acquire(timeout=_POLL_SECONDS):
            return False
    return True


@contextmanager
def _count_signals() -> Iterator[threading.Semaphore]:
    """Return a context in which each SIGTERM or SIGINT only releases a semaphore."""
    received = threading.Semaphore(0)

    def on_signal(number: int, frame: FrameType | None) -> None:
        received.release()

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _local_cluster_address() -> str:
    """Return the address of the one cluster that has a node on this machine."""
    import psutil

    addresses: set[str] = set()
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "raylet":
            words = [word for line in process.info["cmdline"] or () for word in line.split()]
            addresses |= {word.partition("=")[2] for word in words if word.startswith("--gcs-address=")}
    if len(addresses) != 1:
        clusters = f"{len(addresses)} ({', '.join(sorted(addresses))})" if addresses else "none"
        raise UserError(
            f"this machine must be in exactly one Ray cluster, but is in {clusters}: give an address (--ray-address)"
        )
    return addresses.pop()


def _gpu_count() -> int:
    import torch

    return torch.cuda.device_count()
