"""Where caching is unlikely to pay: few calls, schedulers and models that are made for few; and where nobody knows."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .schedule import Schedule

FEW_CALLS = 15
"""Below so many UNet calls, fewer uncached steps at the same time make the better image."""

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_TUNED = "tuned"  # schedules of this kind were measured beside fewer steps before they were kept


def against_caching(schedule: Schedule | None, calls: int, config: Mapping[str, Any], scheduler: object) -> str | None:
    """What to tell a user whose generation will hardly gain by its schedule; None where it may.

    Args:
        schedule: of the generation.
        calls: of the UNet in it.
        config: the UNet's. One distilled for few steps (LCM) embeds its guidance, in ``time_cond_proj_dim`` numbers.
        scheduler: the pipeline's, if there is one.
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
        "time, rather take fewer steps without caching (unet.set_schedule(None), offcut run --interval 1)"
    )


def beyond_tuning(schedule: Schedule | None, loras: Collection[str]) -> str | None:
    """What to tell a user whose schedule was tuned without the LoRAs that are on; None where that is not so."""
    if not loras or schedule is None or schedule.kind != _TUNED:
        return None
    return (
        f"this schedule was tuned without the LoRA {', '.join(loras)}: how near its images come to uncached ones was "
        "not measured; offcut build --lora and offcut tune measure it"
    )
