"""Small video UNets of every family, and their pipelines, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.models import new_unet, text_to_latent_parts

SKIPS = {"svd": 4, "animatediff": 4, "text-to-video": 4}
"""Each family with the number of its skip connections."""

_SHARED: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "sample_size": 8,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "projection_dim": 16,
    "image_size": 224,
    "patch_size": 56,
}
"""Config of the image encoder."""

UNETS: dict[str, dict[str, Any]] = {
    "svd": _SHARED
    | {
        "_class_name": "UNetSpatioTemporalConditionModel",
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        "num_attention_heads": (2, 4),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24,
        "num_frames": 3,
    },
    "animatediff": _SHARED
    | {
        "_class_name": "UNetMotionModel",
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
        "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 8,
        "norm_num_groups": 8,
    },
    "text-to-video": _SHARED
    | {
        "_class_name": "UNet3DConditionModel",
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"),
        "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    },
}
"""Config of each family's UNet: two levels and one layer a block."""


def save_video_unet(name: str, path: Path) -> Path:
    new_unet(UNETS[name]).save_pretrained(path)
    return path


def random_inputs(name: str, *, batch: int, frames: int, height: int, width: int, sequence: int = 7) -> dict[str, Any]:
    """Return random inputs that the family's pipeline could pass to the UNet."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    inputs = {"timestep": torch.randint(0, 1000, (batch,), generator=generator).float()}
    if name == "svd":
        inputs["sample"] = normal(batch, frames, 8, height, width)
        inputs["encoder_hidden_states"] = normal(batch, 1, 16)
        inputs["added_time_ids"] = torch.tensor([[6.0, 127.0, 0.02]]).repeat(batch, 1)
        return inputs
    inputs["sample"] = normal(batch, 4, frames, height, width)
    repeated = batch * frames if name == "animatediff" else batch
    inputs["encoder_hidden_states"] = normal(repeated, sequence, 16)
    return inputs


def save_video_pipeline(name: str, path: Path) -> Path:
    """Save the diffusers pipeline of one of ``SKIPS``; a video has 3 frames of 32x32, with latents of 8x8."""
    import diffusers

    unet = new_unet(UNETS[name])
    if name == "svd":
        diffusers.StableVideoDiffusionPipeline(**_image_to_latent_parts(), unet=unet).save_pretrained(path)
        return path
    parts = text_to_latent_parts(path, width=16)
    if name == "text-to-video":
        diffusers.TextToVideoSDPipeline(**parts, unet=unet).save_pretrained(path)
        return path
    # Its own weights are those that the UNet has: diffusers joined them when it was loaded.
    diffusers.AnimateDiffPipeline(**parts, unet=unet, motion_adapter=motion_adapter()).save_pretrained(path)
    return path


def image_encoder() -> Any:
    """Return a CLIP image encoder with embeddings of 16 numbers."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(0)
    return CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()


def video_vae() -> Any:
    """Return the VAE of Stable Video Diffusion; its latents are a quarter of the image's sides."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1
    )
    return vae.eval()


def video_scheduler() -> Any:
    """Return the scheduler of Stable Video Diffusion."""
    import diffusers

    return diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        timestep_type="continuous",
        timestep_spacing="leading",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
        steps_offset=1,
        interpolation_type="linear",
    )


def motion_adapter() -> Any:
    """Return the motion adapter of ``animatediff``."""
    import diffusers

    torch.manual_seed(0)
    return diffusers.MotionAdapter(
        block_out_channels=(32, 64),
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        motion_norm_num_groups=8,
    )


def _image_to_latent_parts() -> dict[str, Any]:
    """Return the components of Stable Video Diffusion: image encoder and processor, VAE, scheduler."""
    from transformers import CLIPImageProcessor

    return {
        "image_encoder": image_encoder(),
        "feature_extractor": CLIPImageProcessor(),
        "vae": video_vae(),
        "scheduler": video_scheduler(),
    }
