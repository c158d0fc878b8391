"""``ImageRequest``: one image or video to generate, and the arguments of its pipeline call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

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
    guidance = "guidance_scale" if "guidance_scale" in parameters else "max_guidance_scale"
    frames = next((name for name in _FRAME_PARAMETERS if name in parameters), _FRAME_PARAMETERS[0])
    optional = {
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "image": request.image,
        frames: request.frames,
    }
    if unused := [name for name, value in optional.items() if value is not None and name not in parameters]:
        raise UserError(f"{kind} takes no {unused[0].replace('_', ' ').removeprefix('num ')}: leave it out")
    arguments = optional | {
        "image": None if request.image is None else _read_image(request.image),
        "num_inference_steps": request.steps,
        guidance: guidance_of(pipe, request),
        "height": request.height,
        "width": request.width,
        "output_type": "pil",
    }
    return {name: value for name, value in arguments.items() if value is not None and name in parameters}


def _read_image(file: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file).convert("RGB")
    except UnidentifiedImageError as error:
        raise UserError(f"{file} is not an image that Pillow reads: give a PNG or JPEG") from error
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or 'it is damaged'}; give another image") from error
