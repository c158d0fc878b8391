"""The ``serve`` command: a bundle behind OpenAI's image API."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..runtime.server.settings import RequestLimits, ServeSettings, WorkerConfig, allowed_hosts
from .cluster import RayOptions, print_address, serve_on_cluster
from .options import EngineChoice, Loras, Origin, unpack
from .shell import err, parse_loras, quiet_libraries, stages

if TYPE_CHECKING:
    from ..engines.bundle.bundle import Bundle

_LIMITS_PANEL = "Request limits"

_LIMITS = {
    "steps": typer.Option("--max-steps", help="Scheduler steps.", min=1),
    "images": typer.Option("--max-images", help="Images per request.", min=1, max=10),
    "pixels": typer.Option(
        "--max-pixels", help="Pixels per image; by default four times the model's own size.", min=64, show_default=False
    ),
    "pixel_steps": typer.Option(
        "--max-pixel-steps", help="Pixels times steps, summed over the images of a request.", min=64
    ),
    "prompt_chars": typer.Option("--max-prompt", help="Characters of a prompt.", min=1),
    "body_bytes": typer.Option("--max-body", help="Bytes of a request body.", min=1024),
}

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


@dataclass(frozen=True)
class AccessOptions:
    """Address of the server, and who may use it."""

    host: Annotated[
        str, typer.Option(help="Address to listen on; by default only this machine reaches the server.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 chooses a free one.", min=0, max=65535)] = 8000
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="OFFCUT_API_KEY",
            show_envvar=True,
            help="Bearer token that requests must carry. Prefer the variable: other users can see command lines.",
        ),
    ] = None
    allow_host: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="NAME", help="Host name by which clients may call the server, e.g. through a proxy; repeatable."
        ),
    ] = ()
    name: Annotated[
        tuple[str, ...],
        typer.Option(
            metavar="NAME",
            help="Model name for clients; by default the bundle's name. Repeat it once for each bundle.",
        ),
    ] = ()


@dataclass(frozen=True)
class RequestDefaults:
    """Values for requests that leave them out; the defaults are those of ``ServeSettings``."""

    interval: Annotated[
        int, typer.Option(help="Run the full UNet every N calls; 1 is uncached. Costs quality.", min=1)
    ] = ServeSettings.interval
    warmup: Annotated[int, typer.Option(help="Number of calls at the start that are always full.", min=0)] = (
        ServeSettings.warmup
    )
    schedule: Annotated[
        str | None,
        typer.Option(
            help="Schedule in place of --interval and --warmup, e.g. quad:5; auto or tuned:NAME for a schedule from "
            "offcut tune. Costs quality."
        ),
    ] = ServeSettings.schedule
    forecast: Annotated[
        float,
        typer.Option(
            metavar="DAMPING",
            help="Extrapolate the cached features: 0 reuses them, 1 is undamped. Not for ancestral samplers.",
            min=0,
            max=1,
        ),
    ] = ServeSettings.forecast
    steps: Annotated[int, typer.Option(help="Number of scheduler steps.", min=1)] = ServeSettings.steps
    guidance: Annotated[float, typer.Option(help="Guidance scale; 1 switches guidance off.", min=0)] = (
        ServeSettings.guidance
    )


@dataclass(frozen=True)
class ConcurrencyOptions:
    """Size of the worker; the defaults are those of ``WorkerConfig``."""

    max_in_flight: Annotated[int, typer.Option(help="Requests that run at once.", min=1)] = WorkerConfig.max_in_flight
    max_queue: Annotated[int, typer.Option(help="Further requests that may wait.", min=0)] = WorkerConfig.max_queue
    max_batch: Annotated[int, typer.Option(help="Largest batch size of an engine call, in rows.", min=1)] = (
        WorkerConfig.max_batch
    )
    cache_mib: Annotated[int, typer.Option(help="Memory for cached features, in MiB.", min=1)] = (
        WorkerConfig.cache_bytes // 2**20
    )
    drain: Annotated[float, typer.Option(help="Seconds for requests in flight to finish after SIGTERM.", min=0.1)] = (
        ServeSettings.drain
    )


@unpack
def serve(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE", help="Bundle directory that offcut build wrote; several with --ray."),
    ],
    origin: Annotated[Origin, "Origin of the bundle"],
    access: Annotated[AccessOptions, "Network and access"],
    defaults: Annotated[RequestDefaults, "Request defaults"],
    limits: Annotated[RequestLimits, _LIMITS, _LIMITS_PANEL],
    concurrency: Annotated[ConcurrencyOptions, "Concurrency"],
    ray: Annotated[RayOptions, "Several devices and machines"],
    engine: Annotated[EngineChoice, "Engine"],
    timeout: Annotated[
        float,
        typer.Option(
            help="Seconds until a request is given up; a request may set a shorter time.",
            min=0.1,
            rich_help_panel=_LIMITS_PANEL,
        ),
    ] = ServeSettings.timeout,
    sampler: Annotated[
        str | None, typer.Option(help="Class name of a diffusers scheduler; by default the model's own.")
    ] = None,
    lora: Loras = None,
) -> None:
    """Serve images over HTTP as in OpenAI's API, with metrics, health checks and a page to try the model.

    Requests at different steps share engine calls. After SIGTERM, requests in flight finish. An engine failure ends
    the process with an error, so let a process manager start it again.
    """
    from ..errors import MissingExtraError, UserError

    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError("offcut serve", package, "serve")
    bundle = None
    if origin.expect_digest is not None and len(bundles) > 1:
        raise UserError("--expect-digest is the digest of one bundle: give one, or check each with offcut verify")
    if not ray.ray:
        if len(bundles) > 1 or ray.update or ray.kuberay:
            raise UserError("several bundles, --update and --kuberay need Ray: add --ray")
        bundle = origin.open(bundles[0])  # before imports that take seconds
    settings = ServeSettings(
        api_key=access.api_key,
        hosts=allowed_hosts("0.0.0.0" if ray.kuberay else access.host, access.allow_host),
        limits=limits,
        timeout=timeout,
        drain=concurrency.drain,
        **vars(defaults),
    )
    config = WorkerConfig(
        bundle=str(bundles[0].resolve()),
        **vars(engine),
        **vars(origin),
        sampler=sampler,
        loras=tuple((str(Path(path).resolve()), scale) for path, scale in parse_loras(lora).items()),
        max_in_flight=concurrency.max_in_flight,
        max_queue=concurrency.max_queue,
        max_batch=concurrency.max_batch,
        cache_bytes=concurrency.cache_mib * 2**20,
    )
    workers = _workers_by_name([replace(config, bundle=str(path.resolve())) for path in bundles], access.name)
    if bundle is None:
        serve_on_cluster(workers, settings, ray, access.host, access.port)
        return
    ((name, config),) = workers.items()
    _serve_in_process(bundle, config, settings, name, access)


def _workers_by_name(configs: Sequence[WorkerConfig], names: Sequence[str]) -> dict[str, WorkerConfig]:
    from ..errors import UserError

    workers = dict(zip(names or [config.default_name for config in configs], configs, strict=False))
    if len(workers) != len(configs) or len(names) > len(configs):
        raise UserError("each bundle needs a name of its own: give --name once for each")
    return workers


def _serve_in_process(
    bundle: Bundle, config: WorkerConfig, settings: ServeSettings, name: str, access: AccessOptions
) -> None:
    from ..runtime.server.run import listen
    from ..runtime.server.run import serve as run
    from ..runtime.server.service import open_service

    listener = listen(access.host, access.port)
    choice = bundle.choose_engine(config.engine, config.device)
    err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    with stages() as stage:
        service = open_service(config, settings, name, bundle, stage)
    run(service, listener, lambda port: print_address(access.host, port, settings, name))
    if service.gave_up:  # an engine call is still running, and nothing can interrupt it but the end of the process
        logging.shutdown()
        os._exit(0)
