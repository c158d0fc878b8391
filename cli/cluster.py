"""The ``serve`` command with ``--ray``: the same server on several devices and machines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import err, quiet_libraries

if TYPE_CHECKING:
    from ..runtime.server.cluster.cluster_plan import ClusterPlan
    from ..runtime.server.settings import ServeSettings, WorkerConfig


@dataclass(frozen=True)
class RayOptions:
    """Whether and how Ray Serve runs the server."""

    ray: Annotated[
        bool, typer.Option("--ray", help="Serve with Ray Serve: one replica per device behind one ingress.")
    ] = False
    replicas: Annotated[
        str,
        typer.Option(
            metavar="N or LOW..HIGH", help="Number of replicas; with a range, Ray starts as many as the queue needs."
        ),
    ] = "1"
    replica_cpus: Annotated[
        float | None, typer.Option(help="CPUs that Ray reserves for a replica; by default --threads, else 1.", min=0)
    ] = None
    replica_gpus: Annotated[
        float | None, typer.Option(help="GPUs that Ray reserves for a replica; by default 1 on cuda, else 0.", min=0)
    ] = None
    loaded: Annotated[
        int | None, typer.Option(help="Bundles that a replica keeps open at once; by default all.", min=1)
    ] = None
    surge: Annotated[
        int,
        typer.Option(
            help="Additional replicas that an update may start before old ones stop, in percent of the replicas; with "
            "0 an old one stops first.",
            min=0,
            max=100,
        ),
    ] = 0
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            show_envvar=True,
            help="Deploy to the cluster at this address and return; by default a cluster starts on this machine and "
            "ends with the command.",
        ),
    ] = None
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Replace what a cluster serves by these bundles, and return; by default on this machine's cluster.",
        ),
    ] = False
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="Print a manifest for Kubernetes (KubeRay) instead of serving.")
    ] = False


def serve_on_cluster(
    workers: Mapping[str, WorkerConfig], settings: ServeSettings, options: RayOptions, host: str, port: int
) -> None:
    """Print a manifest, deploy to a cluster, or start a cluster on this machine and serve until a signal.

    Args:
        workers: worker configuration of each model by its name.
        host, port: address to listen on.

    Raises:
        UserError: Ray is missing, a bundle does not open, or the cluster does not accept the deployment.
    """
    from ..errors import MissingExtraError

    if find_spec("ray") is None:
        raise MissingExtraError("offcut serve --ray", "ray", "ray")
    plan = _plan(workers, settings, options)
    if options.kuberay:
        from ..runtime.server.cluster.cluster_plan import kuberay_manifest

        print(kuberay_manifest(plan), end="")
        return
    for config in workers.values():  # a bad bundle fails here sooner, and with a clearer message, than in a replica
        choice = config.open_bundle().choose_engine(config.engine, config.device)
        err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    from ..runtime.server.cluster import deploy

    names = ", ".join(workers)
    address = options.ray_address or ("auto" if options.update else None)
    if address is None:

        def on_listening(port: int, cluster: str) -> None:
            err.print(f"cluster {cluster}", highlight=False, markup=False, soft_wrap=True)
            print_address(host, port, settings, names)

        deploy.run_foreground(plan, host, port, on_listening)
        return
    with deploy.connected(address):
        if options.update:
            deploy.check_running()
        else:
            deploy.start_proxies(host, port, everywhere=True)
        deploy.deploy(plan)
    err.print(f"{names} on the cluster at {address}", highlight=False, markup=False, soft_wrap=True)


def print_address(host: str, port: int, settings: ServeSettings, names: str) -> None:
    """Print the server's URL in one unwrapped line that scripts can parse, and a warning if anyone may use it."""
    url_host = f"[{host}]" if ":" in host else host
    err.print(f"{names} on http://{url_host}:{port}", highlight=False, markup=False, soft_wrap=True)
    if settings.api_key is None and settings.hosts is None:
        err.print("anyone who reaches this machine may use the server: consider --api-key", style="yellow")


def _plan(workers: Mapping[str, WorkerConfig], settings: ServeSettings, options: RayOptions) -> ClusterPlan:
    from ..runtime.server.cluster.cluster_plan import ClusterPlan, ReplicaScale

    config = next(iter(workers.values()))
    least, most = _replica_range(options.replicas)
    on_gpu = config.device.startswith("cuda")
    scale = ReplicaScale(
        least=least,
        most=most,
        cpus=float(config.threads or 1) if options.replica_cpus is None else options.replica_cpus,
        gpus=float(on_gpu) if options.replica_gpus is None else options.replica_gpus,
        surge=options.surge,
    )
    return ClusterPlan(workers, settings, scale, config.max_queue, options.loaded or len(workers))


def _replica_range(text: str) -> tuple[int, int]:
    from ..errors import UserError

    low, dots, high = text.partition("..")
    try:
        return int(low), int(high if dots else low)
    except ValueError as error:
        raise UserError(
            f"{text!r} is not a number of replicas: write 2, or 1..4 for as many as the queue needs"
        ) from error
