"""What a client gets that asked for images."""

from __future__ import annotations

import time
from typing import Any

from .going import Drawn
from .model import Model
from .settings import Settings
from .wanted import Wanted

_FORM = {"background": "opaque", "output_format": "png", "quality": "auto"}


def images(asked: Wanted, drawn: Drawn) -> dict[str, Any]:
    """OpenAI's ``ImagesResponse``, and under ``offcut`` how the images were made."""
    return {
        "created": int(time.time()),
        "data": [{"b64_json": png} for png in drawn.images],
        "size": _size(asked.size),
        **_FORM,
        "offcut": _how(asked, drawn),
    }


def completed(asked: Wanted, drawn: Drawn) -> dict[str, Any]:
    """OpenAI's event at the end of a stream."""
    return {
        "type": "image_generation.completed",
        "b64_json": drawn.images[0],
        "created_at": int(time.time()),
        "size": _size(asked.size),
        **_FORM,
        "offcut": _how(asked, drawn),
    }


def _how(asked: Wanted, drawn: Drawn) -> dict[str, Any]:
    return {
        "seed": asked.seed,
        "schedule": asked.named,
        "forecast": None if asked.forecast is None else str(asked.forecast),
        "timeline": drawn.timeline,
        "full_calls": drawn.timeline.count("#"),
        "shallow_calls": drawn.timeline.count("."),
        "skipped_calls": drawn.timeline.count("_"),
        "seconds": round(drawn.seconds, 6),
        "queue_seconds": round(drawn.queue_seconds, 6),
    }


def model(served: Model, settings: Settings, created: int) -> dict[str, Any]:
    """OpenAI's ``Model``, and under ``offcut`` what requests may ask of it."""
    limits = settings.limits
    return {
        "id": served.name,
        "object": "model",
        "created": created,
        "owned_by": "offcut",
        "offcut": {
            "size": _size(served.size),
            "multiple": served.multiple,
            "cuts": list(served.cuts),
            "tuned": list(served.tuned),
            "previews": served.previews,
            "defaults": {
                "num_inference_steps": settings.steps,
                "guidance_scale": settings.guidance,
                "interval": settings.interval,
                "warmup": settings.warmup,
                "schedule": settings.schedule,
                "forecast": settings.forecast,
                "timeout": settings.timeout,
            },
            "limits": {
                "prompt_chars": limits.prompt_chars,
                "num_inference_steps": limits.steps,
                "n": limits.images,
                "pixels": limits.pixels,
                "pixel_steps": limits.pixel_steps,
                "body_bytes": limits.body_bytes,
            },
        },
    }


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
