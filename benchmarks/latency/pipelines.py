"""The diffusers pipelines whose loop can be measured, and their defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.bundle.bundle import Bundle
from ...errors import UserError


@dataclass(frozen=True)
class LoopPipeline:
    """The defaults of a pipeline class of diffusers.

    Attributes:
        unet: class name of the UNet.
        scheduler: class name of the scheduler.
        noise: configuration of the published models' scheduler, for bare UNets.
        guidance: guidance scale; for videos that of the last frame.
    """

    unet: str
    scheduler: str
    noise: Mapping[str, Any]
    guidance: float


_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_IMAGES = LoopPipeline("UNet2DConditionModel", "DDIMScheduler", {**_BETAS, "clip_sample": False}, 7.5)
_VIDEOS = LoopPipeline(
    "UNetSpatioTemporalConditionModel",
    "EulerDiscreteScheduler",
    {
        **_BETAS,
        "prediction_type": "v_prediction",
        "interpolation_type": "linear",
        "use_karras_sigmas": True,
        "sigma_min": 0.002,
        "sigma_max": 700.0,
        "timestep_spacing": "leading",
        "timestep_type": "continuous",
    },
    3.0,
)

PIPELINES = {
    "StableDiffusionPipeline": _IMAGES,
    "StableDiffusionXLPipeline": _IMAGES,
    "StableVideoDiffusionPipeline": _VIDEOS,
}
"""Pipelines whose loop can start from prepared tensors, by their class name in diffusers."""


def pipeline_name(bundle: Bundle) -> str:
    """Return the class name of the pipeline that runs the loop; a bare UNet's class and conditioning decide.

    Raises:
        UserError: the pipeline is not one of ``PIPELINES``, or its UNet has inputs that these pipelines do not pass.
    """
    config = bundle.unet_config
    name = bundle.manifest.pipeline
    if name is None:
        names = [name for name, pipeline in PIPELINES.items() if pipeline.unet == config["_class_name"]]
        # Stable Diffusion comes before SDXL; only SDXL has embeddings of the image size.
        name = next(iter(names[-1:] if config.get("addition_embed_type") == "text_time" else names[:1]), None)
    # A video's UNet takes the first image's latent as additional channels.
    channels = config.get("out_channels", 0) * (2 if name is not None and PIPELINES.get(name) is _VIDEOS else 1)
    if name not in PIPELINES or config["in_channels"] != channels:
        raise UserError(
            f"offcut bench latency runs {', '.join(PIPELINES)} with a UNet that gets only latents and "
            f"embeddings, and {bundle.path} has {name or config['_class_name']}: use offcut run, or "
            "unet.record_times in your own loop"
        )
    return name
