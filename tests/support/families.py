"""Small UNets of the image families as their pipelines have them, with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.models import save_unet, with_lively_weights
from support.unets import UNCONDITIONAL

SMALL = {"sample_size": 16, "block_out_channels": (8, 16), "use_linear_projection": True}
SDXL = {**SMALL, "addition_embed_type": "text_time", "addition_time_embed_dim": 4}
UNETS: dict[str, dict[str, Any]] = {
    "sd": {"sample_size": 16, "cross_attention_dim": 32},
    # Stable Diffusion 2: linear projections, heads of one size, so that each level has another number of them.
    "sd2": {
        **SMALL,
        "cross_attention_dim": 32,
        "block_out_channels": (8, 16, 24),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": (2, 4, 6),
        "upcast_attention": True,
    },
    "inpaint": {**SMALL, "in_channels": 9},
    "sdxl": {**SDXL, "projection_class_embeddings_input_dim": 6 * 4 + 10},
    "sdxl-inpaint": {**SDXL, "projection_class_embeddings_input_dim": 6 * 4 + 10, "in_channels": 9},
    "refiner": {**SDXL, "projection_class_embeddings_input_dim": 5 * 4 + 1280},
    # LDM-4-G: three levels, an embedded class as the only thing to attend to.
    "ldm-class": {
        "sample_size": 16,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 24,
    },
}
UNCONDITIONALS: dict[str, dict[str, Any]] = {
    "unconditional": UNCONDITIONAL,
    "class": {**UNCONDITIONAL, "num_class_embeds": 5},
}


def save_family_model(name: str, path: Path, pipeline: Path) -> None:
    """Save a bare UNet, or for Stable Diffusion a pipeline whose safety checker flags every image.

    Args:
        name: of ``UNETS`` or ``UNCONDITIONALS``.
        pipeline: whose other parts that one has.
    """
    import diffusers
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    if name not in UNETS:
        torch.manual_seed(0)
        with_lively_weights(diffusers.UNet2DModel(**UNCONDITIONALS[name])).save_pretrained(path)
        return
    if name != "sd":
        save_unet(path, **UNETS[name])
        return
    network = diffusers.UNet2DConditionModel.from_pretrained(save_unet(path / "bare", **UNETS[name]))
    vision = {
        "hidden_size": 12,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8,
        "patch_size": 4,
    }
    checker = StableDiffusionSafetyChecker(CLIPConfig(vision_config=vision, projection_dim=12))
    with torch.no_grad():
        checker.concept_embeds_weights.fill_(-2)  # every image is closer to every concept
    given = dict(diffusers.StableDiffusionPipeline.from_pretrained(pipeline).components)
    given |= {"unet": network, "safety_checker": checker, "feature_extractor": CLIPImageProcessor(size=8, crop_size=8)}
    diffusers.StableDiffusionPipeline(**given).save_pretrained(path)
