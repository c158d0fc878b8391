"""Configuration of a server: request limits and defaults, timeouts, and the worker behind it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UserError

if TYPE_CHECKING:
    from ...engines.bundle.bundle import Bundle

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""Hosts that only this machine reaches."""


@dataclass(frozen=True)
class RequestLimits:
    """Upper limits of one request. A request above a limit is refused before any work.

    Attributes:
        prompt_chars: characters of the prompt, and of the negative prompt.
        steps: scheduler steps.
        images: images per request.
        pixels: pixels per image; None for four times the pixels of the model's default size.
        pixel_steps: pixels times steps, summed over the request's images.
        body_bytes: size of the request body.
        body_seconds: time for the request body to arrive.

    Raises:
        UserError: a limit is not positive and finite.
    """

    prompt_chars: int = 4000
    steps: int = 150
    images: int = 4
    pixels: int | None = None
    pixel_steps: int = 100 * 2**20
    body_bytes: int = 2**16
    body_seconds: float = 30.0

    def pixels_of(self, default_size: tuple[int, int]) -> int:
        """Return the limit of pixels per image for a model with this default width and height."""
        return 4 * default_size[0] * default_size[1] if self.pixels is None else self.pixels

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UserError(f"the limit {name} is {value}, but must be more than 0")


@dataclass(frozen=True)
class ServeSettings:
    """Access, limits, timeouts and request defaults of one server.

    Attributes:
        api_key: bearer token that requests must carry; None lets everybody in. Health checks and the page need none.
        hosts: host names, without port, by which clients may call the server; None for any. The check keeps out a web
            page that points a host name of its own at this machine (DNS rebinding).
        limits: upper limits of a request.
        timeout: seconds until a request is given up; a request may set a shorter time.
        drain: seconds that requests in flight may take to finish after a SIGTERM.
        stall: seconds without progress after which the engine counts as failed, even if it reports no error.
        linger: seconds for which readiness reports 503 after an engine failure, before the process ends.
        steps, guidance, interval, warmup: defaults for requests that leave them out. Caching costs image quality.
        schedule: default in place of ``interval`` and ``warmup``, for requests that set no schedule and no interval.
            With ``auto`` or ``tuned:NAME``, a request that the tuned schedule was not made for is refused.
        forecast: default damping with which cached features are extrapolated; 0 reuses them. A tuned schedule has a
            forecast of its own.

    Raises:
        UserError: a value is out of range.
    """

    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK
    limits: RequestLimits = RequestLimits()
    timeout: float = 300.0
    drain: float = 300.0
    stall: float = 600.0
    linger: float = 3.0
    steps: int = 30
    guidance: float = 7.5
    interval: int = 5
    warmup: int = 2
    schedule: str | None = None
    forecast: float = 0.0

    def __post_init__(self) -> None:
        if self.api_key is not None and not (self.api_key and self.api_key.isascii() and self.api_key.isprintable()):
            raise UserError("the API key is empty or has characters that no HTTP header can carry: use printable ASCII")
        for name, seconds in (("timeout", self.timeout), ("drain", self.drain), ("stall", self.stall)):
            if not (seconds > 0 and math.isfinite(seconds)):
                raise UserError(f"{name} is {seconds} s, but must be more than 0")
        for name, value, minimum in (
            ("steps", self.steps, 1),
            ("interval", self.interval, 1),
            ("warmup", self.warmup, 0),
        ):
            if value < minimum:
                raise UserError(f"{name} is {value}, but must be at least {minimum}")
        if not 0 <= self.forecast <= 1:
            raise UserError(
                f"the forecast's damping is {self.forecast:g}: give a number from 0 (reuse) to 1 (undamped)"
            )
        if self.steps > self.limits.steps:
            raise UserError(
                f"the default of {self.steps} steps is above the limit of {self.limits.steps}: "
                "lower --steps or raise --max-steps"
            )


@dataclass(frozen=True)
class WorkerConfig:
    """A bundle to open, and the size of the worker that runs it.

    Attributes:
        bundle: the bundle's directory.
        expect_digest, trust: as ``Bundle.open`` takes them.
        engine, device, provider, threads: as ``offcut.load`` takes them.
        sampler: class name of a diffusers scheduler; None keeps the model's own.
        loras: paths of LoRA files with their scales.
        max_in_flight, max_queue, max_batch: as ``Worker`` takes them.
        cache_bytes: device memory for cached features.
    """

    bundle: str
    expect_digest: str | None = None
    trust: bool = False
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

    def open_bundle(self) -> Bundle:
        """Open the bundle; see ``Bundle.open``."""
        from ...engines.bundle.bundle import Bundle

        return Bundle.open(self.bundle, self.expect_digest, trust=self.trust)

    @property
    def default_name(self) -> str:
        """Default model name for clients: the bundle's file name without ``.offcut``."""
        return Path(self.bundle).resolve().name.removesuffix(".offcut")


def allowed_hosts(address: str, names: Iterable[str]) -> tuple[str, ...] | None:
    """Return the host names by which clients may call a server that listens on ``address``.

    Args:
        address: host or address to listen on.
        names: further host names that the user allows.

    Returns:
        Host names in lower case. For a loopback address: the loopback names and ``names``. For other addresses:
        ``names``, or None (any host) if there are none.
    """
    lowered = tuple(name.lower() for name in names)
    if address in LOOPBACK:
        return (*LOOPBACK, *lowered)
    return lowered or None
