"""One image or video, timed: the same prompt and seed with and without caching."""

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
    """An image or a video and how it was made.

    Attributes:
        pictures: the frames of a video; of an image one.
        seconds: wall time of the whole pipeline call.
        run: the UNet's calls, full and shallow, with the engine's seconds of each.
    """

    pictures: tuple[Image, ...]
    seconds: float
    run: Run

    @property
    def image(self) -> Image:
        """The picture; of a video the first frame."""
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
    """Run a pipeline that ``offcut.load`` or ``attach`` gave once, with this schedule; None makes every call full."""
    import torch

    asked = pipeline_arguments(pipe, request)
    pipe.unet.set_schedule(schedule, cut, forecast, reuse_guidance=reuse_guidance)
    pipe.unet.record_times = True
    pipe.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    made = pipe(**asked, **_after_each_step(pipe, on_step), generator=torch.Generator("cpu").manual_seed(request.seed))
    seconds = time.perf_counter() - started
    run = pipe.unet.last_run
    if run is None:
        raise InternalError("the pipeline did not call the UNet")
    found = made.frames[0] if hasattr(made, "frames") else made.images
    return Generated(tuple(_picture(each) for each in (found if makes_videos(pipe) else found[:1])), seconds, run)


def _picture(made: Any) -> Image:
    """A picture that some pipelines give as numbers in [0, 1], [height, width, 3], whatever they are asked for."""
    from PIL import Image

    return made if isinstance(made, Image.Image) else Image.fromarray((made * 255).round().astype("uint8"))


def _after_each_step(pipe: Any, on_step: OnStep) -> dict[str, Any]:
    """The callback under the name and with the arguments that this pipeline has for it, if it has one."""

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    taken = pipeline_parameters(pipe)
    if "callback_on_step_end" in taken:
        return {"callback_on_step_end": step_ended}
    # Unconditional pipelines have no callback.
    return {"callback": lambda step, timestep, latents: on_step()} if "callback" in taken else {}


def warm_up(pipe: Any, request: ImageRequest, cut: str | None = None) -> None:
    """Run both graphs once at the request's shapes; engines prepare their kernels on the first call."""
    brief = replace(request, steps=3, seed=0)
    advises, pipe.unet.advise = pipe.unet.advise, False  # nobody chose so few steps
    try:
        generate(pipe, brief, Steps([0, 2]), cut)
    finally:
        pipe.unet.advise = advises
