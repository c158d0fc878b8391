"""What whoever starts a server decides."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...errors import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class Limits:
    """The most that a request may ask for; what is more is refused before any work.

    Attributes:
        prompt_chars: of the prompt, and of the negative prompt.
        steps: of the scheduler.
        images: of one request.
        pixels: of one image.
        pixel_steps: pixels times steps, of all the request's images together.
        body_bytes, body_seconds: size of a request's body, and how long it may take to arrive.
    """

    prompt_chars: int = 4000
    steps: int = 150
    images: int = 4
    pixels: int = 2**20
    pixel_steps: int = 100 * 2**20
    body_bytes: int = 2**16
    body_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"the limit {name} is {value}, but must be more than 0")


@dataclass(frozen=True)
class Settings:
    """Of one server.

    Attributes:
        api_key: that requests carry as a bearer token; None lets everybody in. Health and the page need none.
        hosts: names by which clients may call it, without port; None for any. A web page that points a name of its own
            at this machine is thereby kept out.
        timeout: seconds within which a request is done or given up; requests may ask for less.
        drain: seconds that requests in flight have after a SIGTERM.
        stall: seconds without any progress after which the engine counts as failed, although it says nothing.
        linger: seconds that readiness says 503 after an engine failed, before the process ends.
        steps, guidance, interval, warmup: for requests that do not say. Caching costs image quality.
        schedule: instead of interval and warmup, for requests that name none of these; ``auto`` and ``tuned:NAME`` are
            refused to requests that they were not made for.
        forecast: damping for requests that do not say and have no tuned schedule; 0 reuses features.
    """

    api_key: str | None = field(default=None, repr=False)
    hosts: tuple[str, ...] | None = LOOPBACK
    limits: Limits = Limits()
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
            raise UserError("the API key is empty or has characters that no header can carry: use printable ASCII")
        for name, value in (("timeout", self.timeout), ("drain", self.drain), ("stall", self.stall)):
            if not (value > 0 and math.isfinite(value)):
                raise UserError(f"{name} is {value} s, but must be more than 0")
        for name, given, least in (
            ("steps", self.steps, 1),
            ("interval", self.interval, 1),
            ("warmup", self.warmup, 0),
        ):
            if given < least:
                raise UserError(f"{name} is {given}, but must be at least {least}")
        if not 0 <= self.forecast <= 1:
            raise UserError(f"a forecast's damping is {self.forecast:g}: give one from 0 (reuse) to 1 (undamped)")
        if self.steps > self.limits.steps:
            raise UserError(
                f"{self.steps} steps by default are more than the {self.limits.steps} that requests may ask"
            )
