"""Advice where caching is unlikely to pay (few calls, few-step models) or where a schedule was tuned without LoRAs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from .schedule import Schedule

FEW_CALLS = 15
"""Number of UNet calls below which fewer steps without caching make a better image in the same time."""

_FEW_STEP_SCHEDULERS = ("LCMScheduler", "TCDScheduler")
_TUNED = "tuned"  # kind of tuned schedules, which `offcut tune` has compared with fewer steps


def caching_advice(schedule: Schedule | None, calls: int, config: Mapping[str, Any], scheduler: object) -> str | None:
    """Return advice against caching for a generation where it is unlikely to pay; None for other generations.

    Args:
        schedule: the generation's schedule.
        calls: number of UNet calls of the generation.
        config: the UNet's config. A UNet that was distilled for few steps (LCM) embeds its guidance scale in
            ``time_cond_proj_dim`` numbers.
        scheduler: the pipeline's scheduler, or None.
    """
    if type(scheduler).__name__ in _FEW_STEP_SCHEDULERS:
        reason = f"{type(scheduler).__name__} makes images in few, large steps"
    elif config.get("time_cond_proj_dim") is not None:
        reason = "this UNet was distilled for few, large steps"
    elif calls < FEW_CALLS:
        reason = f"this generation has {calls} UNet calls, fewer than {FEW_CALLS}"
    else:
        return None
    if calls < 1 or schedule is None or schedule.kind == _TUNED:
        return None
    if len(schedule.full_calls(calls)) == calls:
        return None
    return (
        f"caching is unlikely to pay here: {reason}, and the cached features change much from one call to the next; "
        "to save time, use fewer steps without caching (unet.set_schedule(None), offcut run --interval 1)"
    )


def lora_advice(schedule: Schedule | None, loras: Collection[str]) -> str | None:
    """Return advice for a tuned schedule if LoRAs are loaded, which its tuning did not include; otherwise None."""
    if not loras or schedule is None or schedule.kind != _TUNED:
        return None
    return (
        f"this schedule was tuned without the LoRA {', '.join(loras)}: its image quality with LoRA was not measured; "
        "offcut build --lora and then offcut tune measure it"
    )


def trajectory_advice(before: int, after: int) -> str:
    """Return advice for a loop whose number of UNet calls a step changes, where only their order told them apart.

    Args:
        before, after: numbers of calls of two consecutive steps.
    """
    return (
        f"one step of this generation called the UNet {before} times and the next step {after} times, and only the "
        "order of the calls shows which latent they belong to: if a call was left out or added before others, wrap the "
        "calls of each latent in `with unet.trajectory(key):`"
    )


def exceeded_advice(calls: int) -> str:
    """Return advice for a generation in which one trajectory has more UNet calls than were announced.

    Args:
        calls: announced number of calls.
    """
    return (
        f"this generation has more UNet calls for one latent than the {calls} announced: if some of them are of "
        "another latent (in a callback, or a pass that begins later), wrap these calls in `with unet.trajectory(key):`"
    )
