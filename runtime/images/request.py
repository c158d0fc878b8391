"""``ImageRequest``: one image or video to generate, and the arguments of its pipeline call."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...exporter.families import downsampling
from ..text_to_image import check_multiple, count_calls
from .image_files import read_image

# Parameters of video pipelines for the number of frames; the second is Text2Video-Zero's.
_FRAME_PARAMETERS = ("num_frames", "video_length")


@dataclass(frozen=True)
class ImageRequest:
    """One image or video to generate.

    Attributes:
        prompt: text to generate from; None for pipelines without text input.
        negative_prompt: text to steer away from.
        steps: number of scheduler steps.
        guidance: guidance scale; 1.0 or less runs without classifier-free guidance. None is 7.5 for an image and the
            pipeline's own default for a video.
        seed: seed of the initial noise.
        height: height of the image in pixels; None is the model's own.
        width: width of the image in pixels; None is the model's own.
        image: file of the image that the pipeline starts from.
        frames: number of frames of a video; None is the pipeline's own number.
    """

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int = 50
    guidance: float | None = None
    seed: int = 0
    height: int | None = None
    width: int | None = None
    image: Path | None = None
    frames: int | None = None

    def __post_init__(self) -> None:
        """Check the values that no pipeline takes.

        Raises:
            UserError: a number is out of range, or a text cannot be encoded.
        """
        for name in ("steps", "height", "width", "frames"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, but must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"the seed is {self.seed}, but must be between 0 and {2**63 - 1}")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"the guidance scale is {self.guidance}, but must be a finite number such as 7.5")
        for text in (self.prompt, self.negative_prompt):
            if text is not None and text.encode("utf-8", "ignore").decode() != text:
                raise UserError("the prompt has characters that are not Unicode text: type it again")


def makes_videos(pipe: Any) -> bool:
    """Return whether a pipeline generates videos."""
    return not pipeline_parameters(pipe).keys().isdisjoint(_FRAME_PARAMETERS)


def guidance_of(pipe: Any, request: ImageRequest) -> float | None:
    """Return the request's guidance scale, or else the default; None leaves the scale to the pipeline."""
    if request.guidance is None and not makes_videos(pipe):
        return 7.5
    return request.guidance


def pipeline_parameters(pipe: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a pipeline's call, by name."""
    return inspect.signature(pipe.__call__).parameters


def pipeline_arguments(pipe: Any, request: ImageRequest) -> dict[str, Any]:
    """Return the keyword arguments of a pipeline's call for this request, without the seed and callbacks.

    Raises:
        UserError: the request lacks an argument that the pipeline needs, or has one that the pipeline does not take.
    """
    parameters, kind = pipeline_parameters(pipe), type(pipe).__name__
    if "prompt" in parameters and request.prompt is None:
        raise UserError(f"{kind} generates from a prompt: give one")
    if "image" in parameters and request.image is None:
        raise UserError(f"{kind} starts from an image: give its file with --image")
    if unread := [name for name in ("video", "mask_image") if name in parameters]:
        raise UserError(
            f"{kind} starts from a {unread[0].replace('_', ' ')}, which offcut run does not read: use it from Python"
        )
    guidance = "max_guidance_scale" if "max_guidance_scale" in parameters else "guidance_scale"
    frames = next((name for name in _FRAME_PARAMETERS if name in parameters), _FRAME_PARAMETERS[0])
    optional = {
        "height": request.height,
        "width": request.width,
        guidance: request.guidance,
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "image": request.image,
        frames: request.frames,
    }
    if unused := [name for name, value in optional.items() if value is not None and name not in parameters]:
        raise UserError(f"{kind} takes no {unused[0].replace('_', ' ').removeprefix('num ')}: leave it out")
    size = _size_of(pipe, request)
    arguments = optional | {
        "image": None if request.image is None else read_image(request.image),
        "num_inference_steps": request.steps,
        guidance: guidance_of(pipe, request),
        "height": size[0],
        "width": size[1],
        "output_type": "pil",
    }
    return {name: value for name, value in arguments.items() if value is not None and name in parameters}


def check_request(pipe: Any, request: ImageRequest) -> None:
    """Check that a pipeline can serve a request, before anything is generated.

    Raises:
        UserError: as ``pipeline_arguments``; or the scheduler does not take the number of steps.
        ShapeError: a side of the image is not a valid multiple.
    """
    pipeline_arguments(pipe, request)
    count_calls(pipe.scheduler, request.steps)
    if "height" in pipeline_parameters(pipe):
        check_multiple(request.height, request.width, image_scale(pipe) * downsampling(pipe.unet.config))


def image_scale(pipe: Any) -> int:
    """Return the number of pixels along a side of the image for each of the latent."""
    return int(getattr(pipe, "vae_scale_factor", 1))


def _size_of(pipe: Any, request: ImageRequest) -> tuple[int | None, int | None]:
    """Return height and width; a side that was not given is the model's own, as diffusers ignores a single side."""
    if (request.height is None) == (request.width is None):
        return request.height, request.width
    own: int | Sequence[int] | None = pipe.unet.config["sample_size"]
    if own is None:
        raise UserError("this model has no size of its own: give both --height and --width")
    height, width = (own, own) if isinstance(own, int) else own
    scale = image_scale(pipe)
    return request.height or height * scale, request.width or width * scale
