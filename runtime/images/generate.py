"""Generation of one image or video, with its time and its UNet calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...errors import InternalError
from ..generation.forecast import Forecast
from ..generation.schedule import Schedule, Steps
from ..generation.state import Run
from .request import ImageRequest, makes_videos, pipeline_arguments, pipeline_parameters

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Generated:
    """A generated image or video.

    Attributes:
        pictures: the frames of a video, or the one image.
        seconds: wall time of the whole pipeline call.
        run: record of the UNet's calls, with the engine's seconds for each.
    """

    pictures: tuple[Image, ...]
    seconds: float
    run: Run

    @property
    def image(self) -> Image:
        """The image; for a video the first frame."""
        return self.pictures[0]


def generate(
    pipe: Any,
    request: ImageRequest,
    schedule: Schedule | None,
    cut: str | None = None,
    on_step: OnStep = lambda: None,
    forecast: Forecast | None = None,
    reuse_guidance: bool = False,
) -> Generated:
    """Call a pipeline of ``offcut.load`` or ``offcut.attach`` once.

    Args:
        schedule, cut, forecast, reuse_guidance: as in ``UNet.set_schedule``.
        on_step: called after each step of the scheduler.
    """
    import torch

    arguments = pipeline_arguments(pipe, request) | _step_callback(pipe, on_step)
    pipe.unet.set_schedule(schedule, cut, forecast, reuse_guidance=reuse_guidance)
    pipe.unet.record_times = True
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    output = pipe(**arguments, generator=torch.Generator("cpu").manual_seed(request.seed))
    seconds = time.perf_counter() - started
    run = pipe.unet.last_run
    if run is None:
        raise InternalError("the pipeline did not call the UNet")
    pictures = output.frames[0] if hasattr(output, "frames") else output.images
    if not makes_videos(pipe):
        pictures = pictures[:1]
    return Generated(tuple(map(_as_picture, pictures)), seconds, run)


def _as_picture(output: Any) -> Image:
    """Return an output as a picture; some pipelines always return arrays [height, width, 3] in [0, 1]."""
    from PIL import Image

    return output if isinstance(output, Image.Image) else Image.fromarray((output * 255).round().astype("uint8"))


def _step_callback(pipe: Any, on_step: OnStep) -> dict[str, Any]:
    """Return the keyword argument for the pipeline's step callback; empty where the pipeline has none."""

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    parameters = pipeline_parameters(pipe)
    if "callback_on_step_end" in parameters:
        return {"callback_on_step_end": step_ended}
    # Unconditional pipelines have no callback.
    return {"callback": lambda step, timestep, latents: on_step()} if "callback" in parameters else {}


def warm_up(pipe: Any, request: ImageRequest, cut: str | None = None) -> None:
    """Run both graphs once at the request's shapes; engines prepare their kernels on the first call."""
    short = replace(request, steps=3, seed=0)
    advises, pipe.unet.advise = pipe.unet.advise, False  # the user did not choose these few steps
    try:
        generate(pipe, short, Steps([0, 2]), cut)
    finally:
        pipe.unet.advise = advises
