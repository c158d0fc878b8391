"""One image or video, timed: the same prompt and seed with and without caching."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import InternalError, UserError
from ..generation.forecast import Forecast
from ..generation.generation import Run
from ..generation.schedule import Schedule, Steps

if TYPE_CHECKING:
    from PIL.Image import Image

OnStep = Callable[[], None]


@dataclass(frozen=True)
class Request:
    """What to generate.

    Attributes:
        prompt, negative_prompt: texts; a prompt of None is for pipelines that take none.
        steps: of the scheduler.
        guidance: scale; 1.0 or less runs without classifier-free guidance, None is the pipeline's own default.
        seed: of the initial noise.
        height, width: of the image in pixels; None is the model's own size.
        image: the file of the image that the pipeline starts from.
        frames: of a video; None is the pipeline's own number.
    """

    prompt: str | None
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float | None = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None
    image: Path | None = None
    frames: int | None = None


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
    request: Request,
    schedule: Schedule | None,
    cut: str | None = None,
    on_step: OnStep = lambda: None,
    forecast: Forecast | None = None,
    reuse_guidance: bool = False,
) -> Generated:
    """Run a pipeline that ``offcut.load`` or ``attach`` gave once, with this schedule; None makes every call full."""
    import torch

    asked = arguments(pipe, request)
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


_LENGTHS = ("num_frames", "video_length")
"""What video pipelines call the number of frames; the second is Text2Video-Zero's."""


def makes_videos(pipe: Any) -> bool:
    return not _parameters(pipe).keys().isdisjoint(_LENGTHS)


def arguments(pipe: Any, request: Request) -> dict[str, Any]:
    """What a pipeline is called with for this request, seed and callbacks left out.

    Raises:
        UserError: the request lacks what the pipeline needs, or has what it does not take.
    """
    taken, kind = _parameters(pipe), type(pipe).__name__
    if "prompt" in taken and request.prompt is None:
        raise UserError(f"{kind} draws from a prompt: give one")
    if "image" in taken and request.image is None:
        raise UserError(f"{kind} starts from an image: give its file with --image")
    if unread := [name for name in ("video", "mask_image") if name in taken]:
        raise UserError(
            f"{kind} starts from a {unread[0].replace('_', ' ')}, which offcut run does not read: use it from Python"
        )
    guidance = "guidance_scale" if "guidance_scale" in taken else "max_guidance_scale"
    optional = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "image": request.image,
        _LENGTHS[_LENGTHS[1] in taken]: request.frames,
    }
    if idle := [name for name, value in optional.items() if value is not None and name not in taken]:
        raise UserError(f"{kind} takes no {idle[0].replace('_', ' ').removeprefix('num ')}: leave it out")
    asked = optional | {
        "image": None if request.image is None else _opened(request.image),
        "num_inference_steps": request.steps,
        guidance: request.guidance,
        "height": request.height,
        "width": request.width,
        "output_type": "pil",
    }
    return {name: value for name, value in asked.items() if value is not None and name in taken}


def _picture(made: Any) -> Image:
    """A picture that some pipelines give as numbers in [0, 1], [height, width, 3], whatever they are asked for."""
    from PIL import Image

    return made if isinstance(made, Image.Image) else Image.fromarray((made * 255).round().astype("uint8"))


def _parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(pipe.__call__).parameters


def _after_each_step(pipe: Any, on_step: OnStep) -> dict[str, Any]:
    """The callback under the name and with the arguments that this pipeline has for it, if it has one."""

    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    taken = _parameters(pipe)
    if "callback_on_step_end" in taken:
        return {"callback_on_step_end": step_ended}
    # Unconditional pipelines have no callback.
    return {"callback": lambda step, timestep, latents: on_step()} if "callback" in taken else {}


def _opened(file: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{file} is no image that Pillow reads: give a PNG or JPEG") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or 'it is damaged'}; give another image") from error


def warm_up(pipe: Any, request: Request, cut: str | None = None) -> None:
    """Run both graphs once at the request's shapes; engines prepare their kernels on the first call."""
    brief = replace(request, steps=3, seed=0)
    advises, pipe.unet.advise = pipe.unet.advise, False  # nobody chose so few steps
    try:
        generate(pipe, brief, Steps([0, 2]), cut)
    finally:
        pipe.unet.advise = advises
