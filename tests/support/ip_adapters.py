"""IP-Adapters with random weights for small UNets, in files as they are published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

IMAGE_WIDTH = 12


def save_ip_adapter(path: Path, unet: Any, *, seed: int = 0, plus: bool = False, **extra: torch.Tensor) -> Path:
    """Save an IP-Adapter for this eager UNet. A Plus one reads an image's tokens, a plain one its pooled embedding."""
    generator = torch.Generator().manual_seed(seed)
    width = unet.config.cross_attention_dim

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    tensors = {"image_proj.norm.weight": 1 + normal(width), "image_proj.norm.bias": normal(width)}
    if plus:
        tensors = _resampler(normal, width)
    else:
        tensors |= {"image_proj.proj.weight": normal(4 * width, IMAGE_WIDTH), "image_proj.proj.bias": normal(4 * width)}
    for index, (name, processor) in enumerate(unet.attn_processors.items()):
        if name.endswith("attn2.processor"):
            owner = unet.get_submodule(name.removesuffix(".processor"))
            tensors[f"ip_adapter.{index}.to_k_ip.weight"] = normal(owner.inner_dim, width)
            tensors[f"ip_adapter.{index}.to_v_ip.weight"] = normal(owner.inner_dim, width)
        del processor
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({**tensors, **extra}, path)
    return path


def _resampler(normal: Any, width: int) -> dict[str, torch.Tensor]:
    hidden, inner, queries = 8, 64, 3  # one head of 64
    tensors = {
        "latents": normal(1, queries, hidden),
        "proj_in.weight": normal(hidden, IMAGE_WIDTH),
        "proj_in.bias": normal(hidden),
        "proj_out.weight": normal(width, hidden),
        "proj_out.bias": normal(width),
        "norm_out.weight": 1 + normal(width),
        "norm_out.bias": normal(width),
    }
    for layer in range(4):
        block = f"layers.{layer}"
        tensors |= {
            f"{block}.0.norm1.weight": 1 + normal(hidden),
            f"{block}.0.norm1.bias": normal(hidden),
            f"{block}.0.norm2.weight": 1 + normal(hidden),
            f"{block}.0.norm2.bias": normal(hidden),
            f"{block}.0.to_q.weight": normal(inner, hidden),
            f"{block}.0.to_kv.weight": normal(2 * inner, hidden),
            f"{block}.0.to_out.weight": normal(hidden, inner),
            f"{block}.1.0.weight": 1 + normal(hidden),
            f"{block}.1.0.bias": normal(hidden),
            f"{block}.1.1.weight": normal(4 * hidden, hidden),
            f"{block}.1.3.weight": normal(hidden, 4 * hidden),
        }
    return {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
