"""One image, timed: the same prompt and seed with and without caching."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import InternalError
from ..runtime.generation import Run
from ..runtime.schedule import Schedule, Steps

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt, negative_prompt: texts.
        steps: of the scheduler.
        guidance: scale; 1.0 or less runs without classifier-free guidance.
        seed: of the initial noise.
        height, width: of the image in pixels; None is the model's own size.
    """

    prompt: str
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None


@dataclass(frozen=True)
class Generated:
    """An image and how it was made.

    Attributes:
        image: the picture.
        seconds: wall time of the whole pipeline call.
        run: the UNet's calls, full and shallow, with the engine's seconds of each.
    """

    image: Image
    seconds: float
    run: Run


def generate(
    pipe: Any,
    request: Request,
    schedule: Schedule | None,
    cut: str | None = None,
    on_step: OnStep = lambda: None,
) -> Generated:
    """Run a pipeline that ``offcut.load`` or ``attach`` gave once, with this schedule; None makes every call full."""
    import torch

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    pipe.unet.set_schedule(schedule, cut=cut)
    pipe.unet.record_times = True
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    images = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        height=request.height,
        width=request.width,
        generator=torch.Generator("cpu").manual_seed(request.seed),
        callback_on_step_end=step_ended,
    ).images
    seconds = time.perf_counter() - started
    run = pipe.unet.last_run
    if run is None:
        raise InternalError("the pipeline did not call the UNet")
    return Generated(images[0], seconds, run)


def warm_up(pipe: Any, request: Request, cut: str | None = None) -> None:
    """Run both graphs once at the request's shapes; engines prepare their kernels on the first call."""
    brief = Request(request.prompt, request.negative_prompt, 3, request.guidance, 0, request.height, request.width)
    advises, pipe.unet.advise = pipe.unet.advise, False  # nobody chose so few steps
    try:
        generate(pipe, brief, Steps([0, 2]), cut)
    finally:
        pipe.unet.advise = advises


def psnr(first: Image, second: Image) -> float:
    """Peak signal-to-noise ratio of two RGB images in decibels; infinite where they are equal."""
    import numpy as np

    a = np.asarray(first.convert("RGB"), dtype=np.float64)
    b = np.asarray(second.convert("RGB"), dtype=np.float64)
    error = float(np.mean((a - b) ** 2))
    return math.inf if error == 0 else 10 * math.log10(255.0**2 / error)
