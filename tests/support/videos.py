"""Small video UNets of every family, and their pipelines, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.models import text_to_latent_parts, with_lively_weights

SKIPS = {"svd": 4, "animatediff": 4, "text-to-video": 4}
"""Each family with the number of its skip connections."""

_SHARED: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "cross_attention_dim": 16,
    "sample_size": 8,
}


def new_unet(name: str) -> Any:
    """Save one of ``SKIPS`` with two levels, one layer a block and random weights."""
    import diffusers

    torch.manual_seed(0)
    if name == "svd":
        unet = diffusers.UNetSpatioTemporalConditionModel(
            **_SHARED,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            num_attention_heads=(2, 4),
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=24,
            num_frames=3,
        )
    elif name == "animatediff":
        unet = diffusers.UNetMotionModel(
            **_SHARED,
            down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
            up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
            num_attention_heads=2,
            motion_num_attention_heads=2,
            motion_max_seq_length=8,
            norm_num_groups=8,
        )
    else:
        unet = diffusers.UNet3DConditionModel(
            **_SHARED,
            down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
            up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
            attention_head_dim=4,
            norm_num_groups=8,
        )
    with torch.no_grad():  # their last temporal layers begin as zero, which would hide the frames from each other
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return with_lively_weights(unet).eval()


def save_video_unet(name: str, path: Path) -> Path:
    new_unet(name).save_pretrained(path)
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

    unet = new_unet(name)
    if name == "svd":
        diffusers.StableVideoDiffusionPipeline(**_image_to_latent_parts(), unet=unet).save_pretrained(path)
        return path
    parts = text_to_latent_parts(path, width=16)
    if name == "text-to-video":
        diffusers.TextToVideoSDPipeline(**parts, unet=unet).save_pretrained(path)
        return path
    adapter = diffusers.MotionAdapter(
        block_out_channels=unet.config.block_out_channels,
        motion_layers_per_block=1,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        motion_norm_num_groups=8,
    )
    # Its own weights are those that the UNet has: diffusers joined them when it was loaded.
    diffusers.AnimateDiffPipeline(**parts, unet=unet, motion_adapter=adapter).save_pretrained(path)
    return path


def _image_to_latent_parts() -> dict[str, Any]:
    """Return the components of Stable Video Diffusion: image encoder and processor, VAE, scheduler."""
    import diffusers
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        projection_dim=16,
        image_size=224,
        patch_size=56,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 3, layers_per_block=1
    )
    scheduler = diffusers.EulerDiscreteScheduler(
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
    return {
        "image_encoder": CLIPVisionModelWithProjection(vision).eval(),
        "feature_extractor": CLIPImageProcessor(),
        "vae": vae.eval(),
        "scheduler": scheduler,
    }
