"""Parameters of a request: the body with defaults filled in and limits checked. No engine or tensor is needed."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import CapacityError, LimitError, ScheduleError, ShapeError, UserError
from ..generation.forecast import Extrapolate, Forecast
from ..generation.schedule import SKIP, Schedule, Uniform, parse
from ..tuning.artifact import tuned_name
from .models import ModelInfo
from .schemas import GenerationRequest
from .settings import RequestLimits, ServeSettings


@dataclass(frozen=True)
class CachingParams:
    """Schedule, cut and forecast of a request, as ``Worker.submit`` takes them.

    Attributes:
        schedule: None if every UNet call is full.
        schedule_name: the schedule as text, for the reply.
        cut: cut of the shallow calls for which the schedule sets no cut; None for the model's first cut.
        forecast: None reuses cached features unchanged.
    """

    schedule: Schedule | None = None
    schedule_name: str | None = None
    cut: str | None = None
    forecast: Forecast | None = None


@dataclass(frozen=True)
class ImageParams:
    """Resolved parameters of an image request.

    Attributes:
        arguments: keyword arguments of the pipeline call, without generators.
        caching: schedule, cut and forecast.
        seed: seed of the first image; image ``i`` has ``seed + i``.
        images: number of images.
        size: width and height in pixels.
        timeout: seconds until the deadline.
        stream: whether the client reads an event for each UNet call.
        previews: number of previews in the stream.
        call_seconds: expected duration of one full UNet call of this size; 0 where it is unknown.
    """

    arguments: Mapping[str, Any]
    caching: CachingParams
    seed: int
    images: int
    size: tuple[int, int]
    timeout: float
    stream: bool = False
    previews: int = 0
    call_seconds: float = 0.0

    def pipeline_arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of the pipeline call, with one CPU generator per image."""
        import torch

        seeds = range(self.seed, self.seed + self.images)
        return {**self.arguments, "generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds]}


def resolve_request(
    body: GenerationRequest, model: ModelInfo, settings: ServeSettings, cache_limit: int
) -> ImageParams:
    """Return the parameters of a request, or refuse it.

    Args:
        cache_limit: bytes of cached features that all requests together may hold between their steps.

    Raises:
        LimitError: the request exceeds a limit, or the model does not support it.
    """
    width, height = body.pixels() or model.size
    images = body.n or 1
    steps = settings.steps if body.num_inference_steps is None else body.num_inference_steps
    guidance = settings.guidance if body.guidance_scale is None else body.guidance_scale
    _check_limits(body, settings.limits, model, (width, height), images, steps)
    try:
        model.check_size(width, height)
    except ShapeError as error:
        raise LimitError("size", str(error)) from error
    if body.negative_prompt is not None and "negative_prompt" not in model.arguments:
        raise LimitError("negative_prompt", "this model does not support a negative prompt: leave it out")
    if body.partial_images and not model.previews:
        raise LimitError("partial_images", "this model does not support previews: leave partial_images out")

    timeout = settings.timeout if body.timeout is None else min(body.timeout, settings.timeout)
    rows = images * (2 if guidance > 1 else 1)
    call_seconds = model.call_seconds(rows, width, height)
    if call_seconds > timeout:
        raise LimitError(
            "size",
            f"one UNet call of this size is expected to take {call_seconds:.0f} s, and the request's time limit is "
            f"{timeout:g} s: ask for fewer or smaller images",
        )
    caching = resolve_caching(body, model, settings, steps, guidance)
    if caching.schedule is not None:
        feature_bytes = model.feature_bytes(
            caching.cut, rows, width, height, schedule=caching.schedule, forecast=caching.forecast is not None
        )
        if feature_bytes > cache_limit:
            reason = CapacityError(
                f"this request caches {feature_bytes / 2**20:.1f} MiB of features between its steps, "
                f"and the server has {cache_limit / 2**20:.1f} MiB for them"
            )
            raise LimitError("size", f"{reason}: ask for fewer or smaller images") from reason
    arguments = {
        "prompt": body.prompt,
        "negative_prompt": body.negative_prompt,
        "num_inference_steps": steps,
        "guidance_scale": float(guidance),
        "num_images_per_prompt": images,
        "width": width,
        "height": height,
        "output_type": "pil",
    }
    return ImageParams(
        arguments={name: value for name, value in arguments.items() if name in model.arguments and value is not None},
        caching=caching,
        seed=secrets.randbelow(2**32) if body.seed is None else body.seed,
        images=images,
        size=(width, height),
        timeout=timeout,
        stream=bool(body.stream),
        previews=body.partial_images or 0,
        call_seconds=call_seconds,
    )


def _check_limits(
    body: GenerationRequest,
    limits: RequestLimits,
    model: ModelInfo,
    size: tuple[int, int],
    images: int,
    steps: int,
) -> None:
    pixels = size[0] * size[1]
    for field, unit, value, limit in (
        ("prompt", "characters", len(body.prompt), limits.prompt_chars),
        ("negative_prompt", "characters", len(body.negative_prompt or ""), limits.prompt_chars),
        ("n", "images", images, limits.images),
        ("num_inference_steps", "steps", steps, limits.steps),
        ("size", "pixels", pixels, limits.pixels_of(model.size)),
        ("num_inference_steps", "pixels times steps", pixels * steps * images, limits.pixel_steps),
    ):
        if value > limit:
            raise LimitError(field, f"this asks for {value} {unit}, and the server allows {limit}: ask for less")


def resolve_caching(
    body: GenerationRequest, model: ModelInfo, settings: ServeSettings, steps: int, guidance: float
) -> CachingParams:
    """Return the caching that the request asks for, or else the server's default.

    Raises:
        LimitError: the schedule, cut or forecast does not fit the request or the model.
    """
    try:
        calls = model.calls(steps)
    except UserError as error:
        raise LimitError("num_inference_steps", str(error)) from error
    schedule_text = body.schedule
    if schedule_text is None and body.interval is None and model.cuts:
        schedule_text = settings.schedule
    if schedule_text is not None and (name := tuned_name(schedule_text)) is not None:
        return _tuned_caching(body, model, name, steps, guidance)
    if body.cut == SKIP:
        raise LimitError("cut", f"{SKIP} is not a cut: choose one of {', '.join(model.cuts) or 'none'}")
    field = "schedule" if schedule_text is not None else "interval"
    try:
        schedule = _parse_schedule(body, model, settings, schedule_text)
        if schedule is not None:
            schedule.full_calls(calls)  # raises if the schedule does not fit this number of calls
    except ScheduleError as error:
        raise LimitError(field, str(error)) from error
    try:
        model.check_cut(body.cut, shallow=schedule is not None)
    except UserError as error:
        raise LimitError("cut" if body.cut is not None else field, str(error)) from error
    if schedule is None:
        if body.forecast:
            raise LimitError(
                "forecast", "every call of this request is full, so nothing is forecast: leave forecast out"
            )
        return CachingParams(cut=body.cut)
    damping = settings.forecast if body.forecast is None else body.forecast
    return CachingParams(schedule, str(schedule), body.cut, Extrapolate(damping) if damping else None)


def _parse_schedule(
    body: GenerationRequest, model: ModelInfo, settings: ServeSettings, text: str | None
) -> Schedule | None:
    if text is not None:
        return parse(text, warmup=body.warmup)
    interval = body.interval or (settings.interval if model.cuts else 1)
    warmup = settings.warmup if body.warmup is None else body.warmup
    return Uniform(interval, warmup=warmup) if interval > 1 else None


def _tuned_caching(body: GenerationRequest, model: ModelInfo, name: str, steps: int, guidance: float) -> CachingParams:
    for field, value in {"warmup": body.warmup, "cut": body.cut, "forecast": body.forecast}.items():
        if value is not None:
            raise LimitError(field, f"a tuned schedule has a {field} of its own: leave it out, or give an interval")
    try:
        tuned = model.tuned_for(name or None, steps, guidance)
    except ScheduleError as error:
        raise LimitError("schedule", str(error)) from error
    try:
        for cut in tuned.document.used_cuts:
            model.check_cut(cut, shallow=True)
    except UserError as error:
        raise LimitError("schedule", f"the schedule {tuned.name} does not fit: {error}") from error
    return CachingParams(tuned.schedule, f"tuned:{tuned.name}", tuned.document.cut, tuned.forecast)
