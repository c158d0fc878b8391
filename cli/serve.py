"""``offcut serve``: a bundle behind OpenAI's image API."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .shell import BundleArgument, Device, EngineName, Loras, Provider, Threads, err, loras_of, quiet_libraries, stages

if TYPE_CHECKING:
    from ..runtime.server.settings import Settings

_WHERE = {"rich_help_panel": "Where, and for whom"}
_DEFAULTS = {"rich_help_panel": "For requests that do not say"}
_LIMITS = {"rich_help_panel": "The most that a request may ask for"}
_LOAD = {"rich_help_panel": "How much at once"}

_PACKAGES = {"fastapi": "fastapi", "uvicorn": "uvicorn", "prometheus_client": "prometheus-client"}


def serve(
    bundle: BundleArgument,
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
        str | None, typer.Option(help="Of the model, for clients; the bundle's own by default.", **_WHERE)
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
    policy: Annotated[str, typer.Option(help="deadline, largest or aligned.", **_LOAD)] = "deadline",
    drain: Annotated[
        float, typer.Option(help="Seconds that requests have to finish after SIGTERM.", min=0.1, **_LOAD)
    ] = 300.0,
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
    from ..errors import MissingExtraError

    for module, package in _PACKAGES.items():
        if find_spec(module) is None:
            raise MissingExtraError("offcut serve", package, "serve")
    from ..engines.bundle import Bundle

    opened = Bundle.open(bundle)  # before what takes seconds to import
    from ..runtime.batching import Worker
    from ..runtime.batching.policy import policy_of
    from ..runtime.draw import with_class
    from ..runtime.pipeline import load
    from ..runtime.server.guard import hosts_for
    from ..runtime.server.run import listen
    from ..runtime.server.run import serve as run
    from ..runtime.server.served import Served
    from ..runtime.server.service import Service
    from ..runtime.server.settings import Limits, Settings

    settings = Settings(
        api_key=api_key,
        hosts=hosts_for(host, allow_host or ()),
        limits=Limits(
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
    chosen = policy_of(policy)
    address = listen(host, port)
    choice = opened.choose_engine(engine, device)
    err.print(f"engine {choice.name}: {choice.reason}", highlight=False)
    quiet_libraries()
    with stages() as stage:
        stage("load the bundle")
        pipe = load(opened, choice.name, device=device, provider=provider, threads=threads)
        served = Served.of(pipe, opened, choice.name, device, name or _name_of(bundle))
        if sampler is not None:
            served.pipe.scheduler = with_class(served.pipe.scheduler, sampler)
        for path, scale in loras_of(lora).items():
            stage(f"load the LoRA {Path(path).name} at {scale:g}")
            served.pipe.unet.load_lora(path, scale)
        stage("draw once to warm up")
        served.warm_up(guidance)
    worker = Worker(
        served.pipe,
        max_in_flight=max_in_flight,
        max_queue=max_queue,
        cache_bytes=cache_mib * 2**20,
        max_batch=max_batch,
        policy=chosen,
    )
    run(Service(worker, served, settings), address, lambda bound: _say(host, bound, settings, served.name))


def _name_of(bundle: Path) -> str:
    return bundle.resolve().name.removesuffix(".offcut")


def _say(host: str, port: int, settings: Settings, name: str) -> None:
    shown = f"[{host}]" if ":" in host else host
    # One line that scripts can read, whatever the width of the terminal.
    err.print(f"{name} on http://{shown}:{port}", highlight=False, markup=False, soft_wrap=True)
    if settings.api_key is None and settings.hosts is None:
        err.print("everybody who reaches this machine may use it: think of --api-key", style="yellow")
