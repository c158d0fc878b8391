"""From a request's body to what a worker is asked for; everything that can be refused is refused here."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CapacityError, LimitError, ShapeError
from ..generation.forecast import Forecast
from ..generation.schedule import Schedule
from .caching import caching
from .model import Model
from .schemas import GenerationRequest
from .settings import Limits, Settings


@dataclass(frozen=True)
class Wanted:
    """What is drawn.

    Attributes:
        arguments: of the pipeline call, without generators.
        schedule, cut, forecast: as a worker takes them; the schedule is None if every call is full.
        named: the schedule in words.
        seed: of the first image.
        images: how many.
        size: width and height in pixels.
        steps: of the scheduler.
        seconds: until the deadline.
        stream: whether the client is told of each UNet call as it is made.
        previews: in the stream.
    """

    arguments: Mapping[str, Any]
    schedule: Schedule | None
    cut: str | None
    forecast: Forecast | None
    named: str | None
    seed: int
    images: int
    size: tuple[int, int]
    steps: int
    seconds: float
    stream: bool
    previews: int

    def pipeline_arguments(self) -> dict[str, Any]:
        """Of one pipeline call, with a generator for each image."""
        import torch

        seeds = range(self.seed, self.seed + self.images)
        return {**self.arguments, "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds]}


def wanted(body: GenerationRequest, served: Model, settings: Settings, cache_limit: int) -> Wanted:
    """What this body asks for. No tensor is touched.

    Args:
        cache_limit: bytes that all requests together may keep between their steps.

    Raises:
        LimitError: it is more than the limits allow, or than this model does.
    """
    limits = settings.limits
    width, height = body.pixels() or served.size
    images = body.n or 1
    steps = settings.steps if body.num_inference_steps is None else body.num_inference_steps
    guidance = settings.guidance if body.guidance_scale is None else body.guidance_scale
    _within(body, limits, (width, height), images, steps)
    try:
        served.check_size(width, height)
    except ShapeError as error:
        raise LimitError("size", str(error)) from error
    if body.negative_prompt is not None and "negative_prompt" not in served.takes:
        raise LimitError("negative_prompt", "this model takes no negative prompt: leave it out")
    if body.partial_images and not served.previews:
        raise LimitError("partial_images", "this model gives no previews: leave partial_images out")

    chosen = caching(body, served, settings, steps, guidance)
    rows = images * (2 if guidance > 1 else 1)
    keeps = 0
    if chosen.schedule is not None:
        twice = chosen.forecast is not None
        keeps = served.slot_bytes(chosen.cut, rows, width, height, schedule=chosen.schedule, twice=twice)
    if keeps > cache_limit:
        needed, there = (f"{count / 2**20:.1f} MiB" for count in (keeps, cache_limit))
        why = CapacityError(f"this keeps {needed} between its steps, of {there} that there are")
        raise LimitError("size", f"{why}: ask for fewer or smaller images") from why
    asked = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": float(guidance),
        "num_images_per_prompt": images,
        "width": width,
        "height": height,
        "output_type": "pil",
    }
    return Wanted(
        arguments={name: value for name, value in asked.items() if name in served.takes and value is not None},
        schedule=chosen.schedule,
        cut=chosen.cut,
        forecast=chosen.forecast,
        named=chosen.named,
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        images=images,
        size=(width, height),
        steps=steps,
        seconds=settings.timeout if body.timeout is None else min(body.timeout, settings.timeout),
        stream=bool(body.stream),
        previews=body.partial_images or 0,
    )


def _within(body: GenerationRequest, limits: Limits, size: tuple[int, int], images: int, steps: int) -> None:
    pixels = size[0] * size[1]
    asked = [
        ("prompt", "characters", len(body.prompt), limits.prompt_chars),
        ("negative_prompt", "characters", len(body.negative_prompt or ""), limits.prompt_chars),
        ("n", "images", images, limits.images),
        ("num_inference_steps", "steps", steps, limits.steps),
        ("size", "pixels", pixels, limits.pixels),
        ("num_inference_steps", "pixels times steps", pixels * steps * images, limits.pixel_steps),
    ]
    for field, what, given, most in asked:
        if given > most:
            raise LimitError(field, f"this asks for {given} {what}, and the server allows {most}: ask for less")
