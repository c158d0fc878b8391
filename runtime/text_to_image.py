"""Calls of a text-to-image pipeline, for calibration, tuning and benchmarks; its scheduler, its steps and its sizes."""

from __future__ import annotations

import copy
import inspect
from typing import Any

from ..errors import ShapeError, UserError


def is_text_to_image(call: Any) -> bool:
    """Return whether a pipeline's ``__call__`` takes a prompt and no image."""
    parameters = inspect.signature(call).parameters
    return "prompt" in parameters and "image" not in parameters


def generate_from_prompt(
    pipe: Any, prompt: str, *, steps: int, guidance: float, seed: int, size: int | None, output: str
) -> Any:
    """Call the pipeline with ``prompt_arguments``, and return its output."""
    return pipe(**prompt_arguments(pipe, prompt, steps=steps, guidance=guidance, seed=seed, size=size, output=output))


def prompt_arguments(
    pipe: Any, prompt: str, *, steps: int, guidance: float, seed: int, size: int | None, output: str
) -> dict[str, Any]:
    """Return the keyword arguments of the pipeline's call; those that the pipeline does not take are left out.

    Args:
        steps: number of scheduler steps.
        guidance: guidance scale.
        seed: seed of the initial noise.
        size: the image's height and width in pixels; None is the model's own.
        output: the pipeline's ``output_type``: ``latent``, ``np``...
    """
    import torch

    parameters = inspect.signature(pipe.__call__).parameters
    optional = {"height": size, "width": size, "guidance_scale": guidance, "output_type": output}
    return {
        "prompt": prompt,
        "num_inference_steps": steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        **{name: value for name, value in optional.items() if name in parameters and value is not None},
    }


def count_calls(scheduler: Any, steps: int) -> int:
    """Return the number of UNet calls for a number of steps; higher-order schedulers make several per step.

    Raises:
        UserError: the scheduler does not take this number of steps.
    """
    scheduler = copy.deepcopy(scheduler)
    try:
        scheduler.set_timesteps(steps)
    except (ValueError, IndexError) as error:
        raise UserError(f"{type(scheduler).__name__} does not take {steps} steps: ask for another number") from error
    return len(scheduler.timesteps)


def check_multiple(height: int | None, width: int | None, multiple: int) -> None:
    """Check the sides of an image in pixels; a side that is None is not checked.

    Raises:
        ShapeError: a side is no multiple of this number.
    """
    for side, pixels in (("width", width), ("height", height)):
        if pixels is not None and pixels % multiple:
            nearest = max(multiple, round(pixels / multiple) * multiple)
            raise ShapeError(
                f"the image's {side} is {pixels}, but this model needs a multiple of {multiple}: the nearest is "
                f"{nearest}"
            )


def scheduler_named(scheduler: Any, name: str) -> Any:
    """Return a scheduler of another class, by its name in diffusers, with the same noise schedule.

    Raises:
        UserError: diffusers has no scheduler of this name, or it is for another kind of model: flow matching, sigmas of
            EDM, inversions.
    """
    import diffusers
    from diffusers.schedulers import KarrasDiffusionSchedulers

    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_config") or not hasattr(kind, "set_timesteps"):
        raise UserError(f"diffusers has no scheduler {name}: give the name of a class, e.g. DDIMScheduler")
    assert kind is not None
    if kind is type(scheduler):
        return kind.from_config(scheduler.config)
    suitable = {*KarrasDiffusionSchedulers.__members__, *_OTHER_SCHEDULERS}
    if name not in suitable or "beta_schedule" not in scheduler.config or "beta_schedule" not in kind().config:
        raise UserError(
            f"{name} does not fit a model for {type(scheduler).__name__}: give a scheduler that takes the same noise "
            "schedule, e.g. DDIMScheduler or DPMSolverMultistepScheduler"
        )
    return kind.from_config(scheduler.config)


_OTHER_SCHEDULERS = ("LCMScheduler", "TCDScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
