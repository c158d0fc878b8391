"""The pipelines that can be measured: which of them runs a bundle, and what it does where nothing else is asked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...engines.bundle.bundle import Bundle
from ...errors import UserError


@dataclass(frozen=True)
class Pipeline:
    """A class of diffusers' pipelines, and its defaults.

    Attributes:
        unet: the class of its UNet.
        scheduler: by its class in diffusers.
        noise: the config of the published models' scheduler, for UNets that come without one.
        guidance: scale; of a video that of the last frame.
    """

    unet: str
    scheduler: str
    noise: Mapping[str, Any]
    guidance: float


_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
_IMAGES = Pipeline("UNet2DConditionModel", "DDIMScheduler", {**_BETAS, "clip_sample": False}, 7.5)
_VIDEOS = Pipeline(
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
"""Those whose loop can be run from tensors given beforehand, by their class in diffusers."""


def pipeline_name(bundle: Bundle) -> str:
    """The class in diffusers that runs the loop of this bundle; a bare UNet's is told by its kind and conditioning.

    Raises:
        UserError: it is none of ``PIPELINES``, or its UNet takes more than they give.
    """
    config = bundle.unet_config
    name = bundle.manifest.pipeline
    if name is None:
        fitting = [each for each, pipeline in PIPELINES.items() if pipeline.unet == config["_class_name"]]
        # Stable Diffusion comes before SDXL, which alone has embeddings of the size.
        name = next(iter(fitting[-1:] if config.get("addition_embed_type") == "text_time" else fitting[:1]), None)
    # A video's UNet gets the latent of the image that it starts from beside the noisy ones.
    given = config.get("out_channels", 0) * (2 if name is not None and PIPELINES.get(name) is _VIDEOS else 1)
    if name not in PIPELINES or config["in_channels"] != given:
        raise UserError(
            f"offcut bench latency runs {', '.join(PIPELINES)} with a UNet that gets nothing but latents and "
            f"embeddings, and {bundle.path} is of {name or config['_class_name']}: use offcut run, or "
            "unet.record_times in a loop of your own"
        )
    return name
