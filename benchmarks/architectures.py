"""Published architectures with random weights, as diffusers saves them, for latency and parity.

python -m offcut.benchmarks.architectures sd15 sd15-random
python -m offcut.benchmarks.architectures sdxl sdxl-random --dtype float16
python -m offcut.benchmarks.architectures svd svd-random
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# UNet configs: the fields that differ from the defaults of the class in diffusers.
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {
        "sample_size": 64,
        "block_out_channels": (320, 640, 1280, 1280),
        "cross_attention_dim": 768,
        "attention_head_dim": 8,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": (5, 10, 20),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    # stable-video-diffusion-img2vid; its XT variant has the default of 25 frames.
    "svd": {"_class_name": "UNetSpatioTemporalConditionModel", "sample_size": 96, "num_frames": 14},
}


def random_unet(name: str, dtype: torch.dtype | None = None, seed: int = 0) -> torch.nn.Module:
    """Return the UNet of an architecture with random weights.

    Args:
        name: a key of ``UNETS``.
        dtype: dtype in which the weights are created, to save memory; float32 by default.
    """
    import diffusers
    import torch

    config = dict(UNETS[name])
    unet_class = getattr(diffusers, config.pop("_class_name", "UNet2DConditionModel"))
    torch.manual_seed(seed)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(dtype or torch.float32)
    try:
        unet = unet_class(**config)
    finally:
        torch.set_default_dtype(default_dtype)
    assert isinstance(unet, torch.nn.Module)
    return unet.eval()


def save(name: str, path: Path, dtype: torch.dtype | None = None) -> Path:
    """Save an architecture: ``sd15`` as a whole pipeline, the others as a bare UNet.

    The pipeline's text encoder and VAE have Stable Diffusion 1.5's sizes. It has the tokenizer of the shapes
    model, because a vocabulary cannot be random.
    """
    unet: Any = random_unet(name, dtype)
    if name != "sd15":
        unet.save_pretrained(path)
        return path
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    from .shapes.model import model_path

    tokenizer = CLIPTokenizer.from_pretrained(model_path() / "tokenizer", model_max_length=77)
    text: Mapping[str, Any] = {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "vocab_size": 49408,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=512,
    )
    pipe = StableDiffusionPipeline(
        vae=vae.to(dtype or torch.float32),
        text_encoder=CLIPTextModel(CLIPTextConfig(**text)).to(dtype or torch.float32),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(path)
    return path


def main() -> None:
    import torch

    summary, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=examples, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=UNETS)
    parser.add_argument("path", type=Path, help="the directory to save to")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    save(arguments.name, arguments.path, getattr(torch, arguments.dtype))
    print(arguments.path)


if __name__ == "__main__":
    main()
