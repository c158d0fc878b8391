"""``offcut serve --ray``: the same server on more devices and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from .shell import err, quiet_libraries

if TYPE_CHECKING:
    from ..runtime.server.cluster.plan import ClusterPlan
    from ..runtime.server.settings import ServeSettings, WorkerConfig


@dataclass(frozen=True)
class Cluster:
    """The options of ``offcut serve`` that are Ray's, as they were given."""

    host: str
    port: int
    address: str | None
    update: bool
    kuberay: bool
    replicas: str
    cpus: float | None
    gpus: float | None
    surge: int
    loaded: int | None


def serve_on_cluster(configs: Mapping[str, WorkerConfig], settings: ServeSettings, cluster: Cluster) -> None:
    """Print a manifest, deploy to a cluster, or serve on one of this machine's own until a signal.

    Raises:
        UserError: Ray is missing, a bundle does not open, or the cluster does not take it.
    """
    from ..engines.bundle.bundle import Bundle
    from ..errors import MissingExtraError

    if find_spec("ray") is None:
        raise MissingExtraError("offcut serve --ray", "ray", "ray")
    plan = _plan(configs, settings, cluster)
    if cluster.kuberay:
        from ..runtime.server.cluster.plan import kuberay_manifest

        print(kuberay_manifest(plan), end="")
        return
    for config in configs.values():  # here it is seen at once, and told better, than in a replica
        choice = Bundle.open(config.bundle).choose_engine(config.engine, config.device)
        err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    from ..runtime.server.cluster import deploy

    names = ", ".join(configs)
    address = cluster.address or ("auto" if cluster.update else None)
    if address is None:

        def listening(port: int, at: str) -> None:
            err.print(f"cluster {at}", highlight=False, markup=False, soft_wrap=True)
            say(cluster.host, port, settings, names)

        deploy.run_foreground(plan, cluster.host, cluster.port, listening)
        return
    with deploy.connected(address):
        if cluster.update:
            deploy.check_running()
        else:
            deploy.start_proxies(cluster.host, cluster.port, everywhere=True)
        deploy.deploy(plan)
    err.print(f"{names} on the cluster at {address}", highlight=False, markup=False, soft_wrap=True)


def say(host: str, port: int, settings: ServeSettings, names: str) -> None:
    """Where the server is, in one line that scripts can read, whatever the width of the terminal."""
    shown = f"[{host}]" if ":" in host else host
    err.print(f"{names} on http://{shown}:{port}", highlight=False, markup=False, soft_wrap=True)
    if settings.api_key is None and settings.hosts is None:
        err.print("everybody who reaches this machine may use it: think of --api-key", style="yellow")


def _plan(configs: Mapping[str, WorkerConfig], settings: ServeSettings, cluster: Cluster) -> ClusterPlan:
    from ..runtime.server.cluster.plan import ClusterPlan, ReplicaScale

    config = next(iter(configs.values()))
    least, most = _range(cluster.replicas)
    on_gpu = config.device.startswith("cuda")
    scale = ReplicaScale(
        least=least,
        most=most,
        cpus=float(config.threads or 1) if cluster.cpus is None else cluster.cpus,
        gpus=float(on_gpu) if cluster.gpus is None else cluster.gpus,
        surge=cluster.surge,
    )
    return ClusterPlan(configs, settings, scale, config.max_queue, cluster.loaded or len(configs))


def _range(text: str) -> tuple[int, int]:
    from ..errors import UserError

    low, dots, high = text.partition("..")
    try:
        return int(low), int(high if dots else low)
    except ValueError as error:
        raise UserError(
            f"{text!r} is no number of replicas: write 2, or 1..4 for as many as the queue needs"
        ) from error
