"""Builders of small diffusers models for the tests, saved as ``save_pretrained`` saves them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# Configs of UNets with 2 levels and 1 layer a block: for latents and text, and for pixels.
LATENT_UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
PIXEL_UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (16, 32),
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
}


def new_unet(config: Mapping[str, Any]) -> Any:
    """Return a UNet with random weights and no layer of zeros.

    Args:
        config: its config; without ``_class_name``, that of a UNet2DConditionModel if it has a width of text, and else
            that of a UNet2DModel.
    """
    import diffusers

    settings = dict(config)
    default = "UNet2DConditionModel" if "cross_attention_dim" in config else "UNet2DModel"
    kind = getattr(diffusers, settings.pop("_class_name", default))
    torch.manual_seed(0)
    unet = kind(**settings)
    with torch.no_grad():  # the last temporal layers begin as zero, which would hide the frames from each other
        for parameter in unet.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return with_lively_weights(unet).eval()


def save_unet(path: Path, **overrides: Any) -> Path:
    """Save a UNet2DConditionModel with 2 levels, 1 layer a block and random weights."""
    new_unet(LATENT_UNET | overrides).save_pretrained(path)
    return path


def save_small_pipeline(path: Path) -> Path:
    """Save a StableDiffusionPipeline with the UNet of ``save_unet``."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(save_unet(path / "unet"))
    StableDiffusionPipeline(
        **text_to_latent_parts(path, width=16),
        unet=unet,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def save_stable_diffusion(path: Path) -> Path:
    """Save a StableDiffusionPipeline with Stable Diffusion 1.5's topology; a 64x64 image has 16x16 latents."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    StableDiffusionPipeline(
        **text_to_latent_parts(path, width=32),
        unet=with_lively_weights(unet),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def save_stable_diffusion_xl(path: Path) -> Path:
    """Save a StableDiffusionXLPipeline with two text encoders and SDXL's topology: 9 skip connections."""
    from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    parts = text_to_latent_parts(path, width=16)
    settings = {**parts["text_encoder"].config.to_dict(), "hidden_size": 24, "projection_dim": 20, "hidden_act": "gelu"}
    tokenizer = save_tokenizer(path / "tokenizer_2")
    second = CLIPTextModelWithProjection(CLIPTextConfig(**settings))
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16 + 24,
        attention_head_dim=2,
        transformer_layers_per_block=(1, 1, 2),
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 20,
    )
    StableDiffusionXLPipeline(
        **parts, text_encoder_2=second, tokenizer_2=tokenizer, unet=with_lively_weights(unet), add_watermarker=False
    ).save_pretrained(path)
    return path


def text_to_latent_parts(path: Path, width: int) -> dict[str, Any]:
    """Return a pipeline's VAE, tokenizer, scheduler, and text encoder with this hidden size."""
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextConfig, CLIPTextModel

    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    tokenizer = save_tokenizer(path / "tokenizer")
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
    )
    return {"vae": vae, "text_encoder": CLIPTextModel(text), "tokenizer": tokenizer, "scheduler": scheduler}


def with_lively_weights(unet: torch.nn.Module) -> Any:
    """Add noise to norm weights and biases, as training does; equal values would hide swapped initializers."""
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return unet


def save_tokenizer(folder: Path) -> Any:
    """Save and return a CLIPTokenizer whose vocabulary is the letters."""
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
