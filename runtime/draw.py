"""One call of a pipeline that draws from a prompt alone, with those of the arguments that it takes; its scheduler."""

from __future__ import annotations

import inspect
from typing import Any

from ..errors import UserError


def draws_from_prompts(call: Any) -> bool:
    """Whether a pipeline's ``__call__`` needs a prompt and no image."""
    taken = inspect.signature(call).parameters
    return "prompt" in taken and "image" not in taken


def draw(pipe: Any, prompt: str, *, steps: int, guidance: float, seed: int, size: int | None, output: str) -> Any:
    """What the pipeline returns; arguments as ``arguments_of``."""
    return pipe(
        **arguments_of(pipe, prompt, steps=steps, guidance=guidance, seed=seed, size=size, output=output),
    )


def arguments_of(
    pipe: Any, prompt: str, *, steps: int, guidance: float, seed: int, size: int | None, output: str
) -> dict[str, Any]:
    """Of the pipeline's call.

    Args:
        steps: of the scheduler.
        guidance: scale.
        seed: of the initial noise.
        size: the image's height and width in pixels; None is the model's own.
        output: the pipeline's ``output_type``: ``latent``, ``np``...
    """
    import torch

    taken = inspect.signature(pipe.__call__).parameters
    asked = {"height": size, "width": size, "guidance_scale": guidance, "output_type": output}
    return {
        "prompt": prompt,
        "num_inference_steps": steps,
        "generator": torch.Generator("cpu").manual_seed(seed),
        **{name: value for name, value in asked.items() if name in taken and value is not None},
    }


def with_class(scheduler: Any, name: str) -> Any:
    """The scheduler of this class with the same noise schedule.

    Raises:
        UserError: diffusers has none of this name.
    """
    import diffusers

    kind = getattr(diffusers, name, None)
    if not hasattr(kind, "from_config"):
        raise UserError(f"diffusers has no scheduler {name}: give one by its class, e.g. DDIMScheduler")
    assert kind is not None
    return kind.from_config(scheduler.config)
