"""From a bundle to a service: the same steps for a server of its own and for each replica of a cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...engines.bundle.bundle import Bundle
from ..batching import Worker
from ..batching.policy import policy_of
from ..draw import with_class
from ..pipeline import load
from .served import Served
from .service import Service
from .settings import Settings


@dataclass(frozen=True)
class Recipe:
    """How a bundle is opened and worked.

    Attributes:
        bundle: its directory.
        engine, device, provider, threads: as ``offcut.load`` takes them.
        sampler: the scheduler's class in diffusers; None for the model's own.
        loras: files with their scales.
        max_in_flight, max_queue, max_batch: of the worker.
        cache_bytes: device memory for cached features.
        policy: deadline, largest or aligned.
    """

    bundle: str
    engine: str = "auto"
    device: str = "cpu"
    provider: str | None = None
    threads: int | None = None
    sampler: str | None = None
    loras: tuple[tuple[str, float], ...] = ()
    max_in_flight: int = 8
    max_queue: int = 64
    max_batch: int = 16
    cache_bytes: int = 2**30
    policy: str = "deadline"

    @property
    def name(self) -> str:
        """Of the model, for clients who are not told another one."""
        return Path(self.bundle).resolve().name.removesuffix(".offcut")


def open_service(
    recipe: Recipe,
    settings: Settings,
    name: str,
    bundle: Bundle | None = None,
    stage: Callable[[str], None] = lambda stage: None,
) -> Service:
    """A worker on the bundle's engines that has drawn once.

    Args:
        name: under which clients ask for the model.
        bundle: the recipe's, where it is open already.
        stage: told of each step.

    Raises:
        UserError: the bundle, an option or the settings do not fit.
    """
    opened = Bundle.open(recipe.bundle) if bundle is None else bundle
    policy = policy_of(recipe.policy)
    engine = opened.choose_engine(recipe.engine, recipe.device).name
    stage("load the bundle")
    pipe = load(opened, engine, device=recipe.device, provider=recipe.provider, threads=recipe.threads)
    if recipe.sampler is not None:
        pipe.scheduler = with_class(pipe.scheduler, recipe.sampler)
    served = Served.of(pipe, opened, engine, recipe.device, name)
    for path, scale in recipe.loras:
        stage(f"load the LoRA {Path(path).name} at {scale:g}")
        pipe.unet.load_lora(path, scale)
    stage("draw once to warm up")
    served.warm_up(settings.guidance)
    worker = Worker(
        pipe,
        max_in_flight=recipe.max_in_flight,
        max_queue=recipe.max_queue,
        cache_bytes=recipe.cache_bytes,
        max_batch=recipe.max_batch,
        policy=policy,
    )
    return Service(worker, served, settings)
