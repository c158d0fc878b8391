"""``offcut serve``: a bundle behind OpenAI's image API."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .cluster import Cluster, say, serve_on_cluster
from .shell import Device, EngineName, Loras, Provider, Threads, err, loras_of, quiet_libraries, stages

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle
    from ..runtime.server.settings import ServeSettings, WorkerConfig

_WHERE = {"rich_help_panel": "Where, and for whom"}
_DEFAULTS = {"rich_help_panel": "For requests that do not say"}
_LIMITS = {"rich_help_panel": "The most that a request may ask for"}
_LOAD = {"rich_help_panel": "How much at once"}
_RAY = {"rich_help_panel": "More devices, more machines"}

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def serve(
    bundles: Annotated[
        list[Path], typer.Argument(metavar="BUNDLE", help="That offcut build made; with --ray there may be several.")
    ],
    host: Annotated[str, typer.Option(help="Address to listen on; this machine alone by default.", **_WHERE)] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="0 for any that is free.", min=0, max=65535, **_WHERE)] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OFFCUT_API_KEY",
            show_envvar=True,
            help="That requests must carry. Others see what stands on a command line: rather use the variable.",
            **_WHERE,
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="A name by which clients call the server, e.g. through a proxy; again for more.",
            **_WHERE,
        ),
    ] = None,
    name: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Of the model, for clients; the bundle's own by default. Again for each bundle.",
            **_WHERE,
        ),
    ] = None,
    interval: Annotated[
        int, typer.Option(help="Full UNet every N calls; 1 is uncached. Costs quality.", min=1, **_DEFAULTS)
    ] = 5,
    warmup: Annotated[int, typer.Option(help="First calls that are always full.", min=0, **_DEFAULTS)] = 2,
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Instead of interval and warmup, e.g. quad:5; auto or tuned:NAME for what offcut tune made. "
            "Costs quality.",
            **_DEFAULTS,
        ),
    ] = None,
    forecast: Annotated[
        float,
        typer.Option(
            metavar="DAMPING",
            help="Extrapolate the cached features: 0 is reuse, 1 undamped. Not for ancestral samplers.",
            min=0,
            max=1,
            **_DEFAULTS,
        ),
    ] = 0.0,
    steps: Annotated[int, typer.Option(help="Of the scheduler.", min=1, **_DEFAULTS)] = 30,
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches it off.", min=0, **_DEFAULTS)] = 7.5,
    max_steps: Annotated[int, typer.Option(help="Of the scheduler.", min=1, **_LIMITS)] = 150,
    max_images: Annotated[int, typer.Option(help="Of one request.", min=1, max=10, **_LIMITS)] = 4,
    max_pixels: Annotated[int, typer.Option(help="Of one image.", min=64, **_LIMITS)] = 2**20,
    max_pixel_steps: Annotated[
        int, typer.Option(help="Pixels times steps, of all images of a request.", min=64, **_LIMITS)
    ] = 100 * 2**20,
    max_prompt: Annotated[int, typer.Option(help="Characters.", min=1, **_LIMITS)] = 4000,
    max_body: Annotated[int, typer.Option(help="Bytes.", min=1024, **_LIMITS)] = 2**16,
    timeout: Annotated[
        float, typer.Option(help="Seconds until a request is given up; clients may ask for less.", min=0.1, **_LIMITS)
    ] = 300.0,
    max_in_flight: Annotated[int, typer.Option(help="Requests that are worked on at once.", min=1, **_LOAD)] = 8,
    max_queue: Annotated[int, typer.Option(help="Requests that wait beside them.", min=0, **_LOAD)] = 64,
    max_batch: Annotated[int, typer.Option(help="Most rows of an engine call.", min=1, **_LOAD)] = 16,
    cache_mib: Annotated[int, typer.Option(help="Memory for cached features, in MiB.", min=1, **_LOAD)] = 1024,
    drain: Annotated[
        float, typer.Option(help="Seconds that requests have to finish after SIGTERM.", min=0.1, **_LOAD)
    ] = 300.0,
    ray: Annotated[
        bool, typer.Option("--ray", help="Serve with Ray Serve: one replica a device, one ingress before them.", **_RAY)
    ] = False,
    replicas: Annotated[
        str,
        typer.Option(metavar="N or LOW..HIGH", help="Replicas; between two numbers as the queue needs them.", **_RAY),
    ] = "1",
    replica_cpus: Annotated[
        float | None, typer.Option(help="That Ray reserves for a replica; --threads, else 1.", min=0, **_RAY)
    ] = None,
    replica_gpus: Annotated[
        float | None, typer.Option(help="That Ray reserves for a replica; 1 on cuda, else none.", min=0, **_RAY)
    ] = None,
    loaded: Annotated[
        int | None, typer.Option(help="Bundles that a replica keeps open at once; all by default.", min=1, **_RAY)
    ] = None,
    surge: Annotated[
        int,
        typer.Option(
            help="Percent of the replicas that an update may start beside the old ones, which else end first.",
            min=0,
            max=100,
            **_RAY,
        ),
    ] = 0,
    ray_address: Annotated[
        str | None,
        typer.Option(
            envvar="RAY_ADDRESS",
            show_envvar=True,
            help="Deploy to this cluster and return; else one starts on this machine, and ends with the command.",
            **_RAY,
        ),
    ] = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Put these bundles in the place of what a cluster serves, this machine's by default, and return.",
            **_RAY,
        ),
    ] = False,
    kuberay: Annotated[
        bool, typer.Option("--kuberay", help="Print a manifest for Kubernetes instead of serving.", **_RAY)
    ] = False,
    sampler: Annotated[str | None, typer.Option(help="The scheduler's class in diffusers; the model's own.")] = None,
    engine: EngineName = "auto",
    device: Device = "cpu",
    provider: Provider = None,
    threads: Threads = None,
    lora: Loras = None,
) -> None:
    """Serve images over HTTP, as OpenAI's clients ask for them, with metrics, health and a page to try it.

    Requests at different steps share engine calls. SIGTERM lets those in flight finish; an engine that fails ends the
    process with an error, so let a process manager start it again.
    """
    from ..errors import MissingExtraError, UserError

    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError("offcut serve", package, "serve")
    opened = None
    if not ray:
        from ..engines.bundle.bundle import Bundle

        if len(bundles) > 1 or update or kuberay:
            raise UserError("several bundles, updates and manifests are Ray's: add --ray")
        opened = Bundle.open(bundles[0])  # before what takes seconds to import
    from ..runtime.server.settings import RequestLimits, ServeSettings, WorkerConfig, allowed_hosts

    settings = ServeSettings(
        api_key=api_key,
        hosts=allowed_hosts("0.0.0.0" if kuberay else host, allow_host or ()),
        limits=RequestLimits(
            prompt_chars=max_prompt,
            steps=max_steps,
            images=max_images,
            pixels=max_pixels,
            pixel_steps=max_pixel_steps,
            body_bytes=max_body,
        ),
        timeout=timeout,
        drain=drain,
        steps=steps,
        guidance=guidance,
        interval=interval,
        warmup=warmup,
        schedule=schedule,
        forecast=forecast,
    )
    first = WorkerConfig(
        bundle=str(bundles[0].resolve()),
        engine=engine,
        device=device,
        provider=provider,
        threads=threads,
        sampler=sampler,
        loras=tuple((str(Path(path).resolve()), scale) for path, scale in loras_of(lora).items()),
        max_in_flight=max_in_flight,
        max_queue=max_queue,
        max_batch=max_batch,
        cache_bytes=cache_mib * 2**20,
    )
    configs = _named([replace(first, bundle=str(bundle.resolve())) for bundle in bundles], name or [])
    if opened is None:
        cluster = Cluster(host, port, ray_address, update, kuberay, replicas, replica_cpus, replica_gpus, surge, loaded)
        serve_on_cluster(configs, settings, cluster)
        return
    ((model, config),) = configs.items()
    _serve_here(opened, config, settings, model, host, port)


def _named(configs: Sequence[WorkerConfig], names: Sequence[str]) -> dict[str, WorkerConfig]:
    from ..errors import UserError

    used = names or [config.default_name for config in configs]
    named = dict(zip(used, configs, strict=False))
    if len(named) != len(configs) or len(names) > len(configs):
        raise UserError("each bundle needs a name of its own: give --name once for each")
    return named


def _serve_here(opened: Bundle, config: WorkerConfig, settings: ServeSettings, name: str, host: str, port: int) -> None:
    from ..runtime.server.run import listen
    from ..runtime.server.run import serve as run
    from ..runtime.server.service import open_service

    address = listen(host, port)
    choice = opened.choose_engine(config.engine, config.device)
    err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    with stages() as stage:
        service = open_service(config, settings, name, opened, stage)
    run(service, address, lambda bound: say(host, bound, settings, name))
