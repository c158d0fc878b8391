"""The deployments of a plan, and how they get onto a cluster."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ....errors import EngineError, UserError
from .names import APP, INGRESS, REPLICA
from .plan import Plan, Scale

if TYPE_CHECKING:
    from ray.serve import Application

_GRACE = 5.0
"""Seconds that a replica has beside its requests' own to end."""


def application(document: Mapping[str, Any]) -> Application:
    """What Ray Serve runs, from a plan's document. A config file names this function as its ``import_path``."""
    return bind(Plan.of(document))


def bind(plan: Plan) -> Application:
    """An ingress before replicas, which belong together by a version that no other deployment has."""
    from ray import serve

    from .ingress import Ingress
    from .replica import Replica

    version, scale = secrets.token_hex(8), plan.scale
    # What is being drawn ends by its own deadline; only then may a replica that leaves be killed.
    leave = {"graceful_shutdown_timeout_s": plan.settings.timeout + _GRACE, "graceful_shutdown_wait_loop_s": 0.5}
    replica = serve.deployment(
        Replica,
        name=REPLICA,
        ray_actor_options={"num_cpus": scale.cpus, "num_gpus": scale.gpus},
        max_ongoing_requests=plan.places,
        health_check_period_s=2.0,
        health_check_timeout_s=30.0,
        max_constructor_retry_count=3,
        max_surge_percent=scale.surge,
        **_count(scale, plan.places),
        **leave,
    )
    ingress = serve.deployment(
        serve.ingress()(Ingress),
        name=INGRESS,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0},
        max_ongoing_requests=4096,  # its own limits come first
        max_surge_percent=100,  # so that there always is one
        **leave,
    )
    return ingress.bind(replica.bind(plan, version), plan, version)


def _count(scale: Scale, places: int) -> dict[str, Any]:
    if scale.least == scale.most:
        return {"num_replicas": scale.least}
    return {
        "autoscaling_config": {
            "min_replicas": scale.least,
            "max_replicas": scale.most,
            "target_ongoing_requests": places,  # what is more waits, so it calls for another replica
            "upscale_delay_s": scale.up_seconds,
            "downscale_delay_s": scale.down_seconds,
        }
    }


def deploy(plan: Plan) -> None:
    """Put it on the cluster that this process is connected to, in the place of what runs there; returns when it is up.

    Raises:
        EngineError: no replica came up; what ran there before goes on where it still can.
    """
    from ray import serve

    try:
        serve.run(bind(plan), name=APP, route_prefix="/")
    except RuntimeError as error:  # all that Ray says of a deployment that failed
        raise EngineError(f"the cluster could not deploy it: {_reason(str(error))}") from error


def running() -> bool:
    """Whether the cluster has offcut on it."""
    from ray import serve

    return APP in serve.status().applications


def check_running() -> None:
    """Raise a ``UserError`` if there is nothing to update."""
    if not running():
        raise UserError("nothing of offcut runs on this cluster: leave --update out")


def _reason(said: str) -> str:
    """The last line of the traceback inside a deployment's error, which names the cause."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else "it does not say why"
