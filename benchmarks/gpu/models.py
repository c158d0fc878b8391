"""Models and inputs for the checks: a small UNet and published architectures, all with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...exporter.specs import symbols
from ..architectures import UNETS, random_unet

if TYPE_CHECKING:
    import torch

    from ...exporter.specs import TensorSpec
    from .peers import Conditioning

DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
"""PyTorch's dtype names by precision."""

SMALL: dict[str, Any] = {
    # Stable Diffusion 1.5's levels, layers and 12 skip connections, with few channels.
    "sample_size": 16,
    "layers_per_block": 2,
    "block_out_channels": (32, 64, 64, 64),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 64,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
SMALL_CUTS = ("deepcache:0", "deepcache:1", "deepcache:4", "mlperf")
EVERY_CUT = (*(f"deepcache:{k}" for k in range(12)), "mlperf")
SIDE = {"small": 16, "sd15": 64, "sdxl": 128}
"""Height and width of the latent that each architecture was trained on."""

TOKENS = 77
# With random weights the deep features hardly change the output. Larger decoder weights make a wrong cache visible.
_GAIN = 2.0


def dtype_of(precision: str) -> torch.dtype:
    """Return PyTorch's dtype of a precision."""
    import torch

    dtype = getattr(torch, DTYPES[precision])
    assert isinstance(dtype, torch.dtype)
    return dtype


def small_unet() -> Any:
    """Return the small UNet in fp32 on the CPU; its weights are always the same."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(**SMALL)
        with torch.no_grad():
            for parameter in unet.parameters():
                # Norms differ in a trained model too. Equal norms would hide swapped initializers.
                if parameter.ndim == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
            for parameter in unet.up_blocks.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(_GAIN)
    return unet.eval()


def save_model(architecture: str, folder: Path, precision: str) -> Path:
    """Save a UNet with random weights: a published architecture in this precision, the small one in fp32."""
    unet: Any = small_unet() if architecture == "small" else random_unet(architecture, dtype_of(precision))
    unet.save_pretrained(folder)
    return folder


def eager_unet(folder: Path, precision: str, device: str, *, channels_last: bool = False) -> Any:
    """Load a saved UNet in eager PyTorch; its attention is ``scaled_dot_product_attention``."""
    import torch
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder, torch_dtype=dtype_of(precision)).eval()
    return unet.to(device, memory_format=torch.channels_last) if channels_last else unet.to(device)


def meta_unet(architecture: str) -> Any:
    """Return the architecture on the meta device, without weights, to count its operations."""
    import torch
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**(SMALL if architecture == "small" else UNETS[architecture])).eval()


def noise(config: Any, images: int, side: int, dtype: torch.dtype, device: str, seed: int = 0) -> torch.Tensor:
    """Return initial latents [images, channels, side, side], the same on every device."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return torch.randn((images, config["in_channels"], side, side), generator=generator).to(device, dtype)


def conditioning(
    config: Any, batch: int, dtype: torch.dtype, device: str, tokens: int = TOKENS, seed: int = 1
) -> Conditioning:
    """Return random inputs of a UNet, without sample and timestep: text embeddings, and SDXL's additional inputs.

    Args:
        config: the UNet's configuration.
        batch: number of rows of a UNet call.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    inputs: dict[str, Any] = {"encoder_hidden_states": normal(batch, tokens, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        side = 8.0 * config["sample_size"]
        times = torch.tensor([[side, side, 0.0, 0.0, side, side]]).repeat(batch, 1)
        inputs["added_cond_kwargs"] = {"text_embeds": normal(batch, width), "time_ids": times.to(device, dtype)}
    return inputs


def dims(specs: list[TensorSpec], batch: int, side: int, tokens: int = TOKENS) -> dict[str, int]:
    """Return the sizes of the dynamic dimensions in these specs."""
    sizes = {"batch": batch, "height": side, "width": side, "sequence": tokens}
    return {name: sizes[name] for name in symbols(specs)}
