"""Advice where caching is unlikely to pay (few calls, models made for few steps) or where a tuning does not apply."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .schedule import Schedule

FEW_CALLS = 15
"""Number of UNet calls below which fewer uncached steps make the better image in the same time."""

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_TUNED = "tuned"  # schedules of this kind were compared with fewer steps when they were made


def against_caching(schedule: Schedule | None, calls: int, config: Mapping[str, Any], scheduler: object) -> str | None:
    """Return advice for a generation that is unlikely to gain by its schedule; None for any other.

    Args:
        schedule: the generation's schedule.
        calls: number of UNet calls of the generation.
        config: the UNet's config. A UNet that was distilled for few steps (LCM) embeds its guidance scale in
            ``time_cond_proj_dim`` numbers.
        scheduler: the pipeline's scheduler, or None.
    """
    if type(scheduler).__name__ in _FEW_STEP_SCHEDULERS:
        why = f"{type(scheduler).__name__} makes images in few, large steps"
    elif config.get("time_cond_proj_dim") is not None:
        why = "this UNet was distilled for few, large steps"
    elif calls < FEW_CALLS:
        why = f"this generation has {calls} UNet calls, fewer than {FEW_CALLS}"
    else:
        return None
    if calls < 1 or schedule is None or schedule.kind == _TUNED:
        return None
    if not schedule.adaptive and len(schedule.full_calls(calls)) == calls:
        return None
    return (
        f"caching is unlikely to pay here: {why}, and the cached features change much from one to the next; to save "
        "time, use fewer steps without caching (unet.set_schedule(None), offcut run --interval 1)"
    )


def beyond_tuning(schedule: Schedule | None, loras: Collection[str]) -> str | None:
    """Return advice for a schedule that was tuned without the LoRAs that are loaded; None for any other."""
    if not loras or schedule is None or schedule.kind != _TUNED:
        return None
    return (
        f"this schedule was tuned without the LoRA {', '.join(loras)}: how near its images come to uncached ones was "
        "not measured; offcut build --lora and offcut tune measure it"
    )
