"""UNets of many configs, built and compared with eager PyTorch; what cannot be built is refused in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import LATENT_UNET, PIXEL_UNET, new_unet

import offcut
from offcut.errors import ModelError

SIMPLE_CROSS = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
}
CLASSES = torch.tensor([3, 4])
NOISE = torch.randn(2, 24, generator=torch.Generator().manual_seed(9))

CONFIGS: dict[str, tuple[dict[str, Any], dict[str, torch.Tensor]]] = {
    "learned time": (PIXEL_UNET | {"time_embedding_type": "learned", "num_train_timesteps": 1000}, {}),
    "Fourier time": (PIXEL_UNET | {"time_embedding_type": "fourier"}, {}),
    "centred input": (PIXEL_UNET | {"center_input_sample": True}, {}),
    "classes": (PIXEL_UNET | {"num_class_embeds": 7}, {"class_labels": CLASSES}),
    "ResNet sampling": (PIXEL_UNET | {"downsample_type": "resnet", "upsample_type": "resnet"}, {}),
    "scale and shift": (PIXEL_UNET | {"resnet_time_scale_shift": "scale_shift"}, {}),
    "skip blocks": (
        PIXEL_UNET | {"down_block_types": ("SkipDownBlock2D",) * 2, "up_block_types": ("SkipUpBlock2D",) * 2},
        {},
    ),
    "one width for each block": (LATENT_UNET | {"cross_attention_dim": (16, 16)}, {}),
    "heads for each block": (LATENT_UNET | {"attention_head_dim": (2, 4)}, {}),
    "layers for each block": (LATENT_UNET | {"layers_per_block": (1, 1), "transformer_layers_per_block": (1, 1)}, {}),
    "Fourier time with text": (LATENT_UNET | {"time_embedding_type": "fourier", "time_embedding_dim": 64}, {}),
    "projected classes": (
        LATENT_UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 24},
        {"class_labels": NOISE},
    ),
    "joined classes": (
        LATENT_UNET | {"num_class_embeds": 5, "class_embeddings_concat": True},
        {"class_labels": CLASSES},
    ),
    "guidance embedding": (LATENT_UNET | {"time_cond_proj_dim": 24}, {"timestep_cond": NOISE}),
    "linear projection": (LATENT_UNET | {"use_linear_projection": True}, {}),
    "cross attention only": (LATENT_UNET | {"only_cross_attention": True}, {}),
    "time activation": (LATENT_UNET | {"timestep_post_act": "silu"}, {}),
    "no middle": (LATENT_UNET | {"mid_block_type": None}, {}),
    "simple cross attention": (LATENT_UNET | SIMPLE_CROSS, {}),
    "projected text": (LATENT_UNET | {"encoder_hid_dim": 20}, {"encoder_hidden_states": torch.ones(2, 7, 20)}),
    "other kernels": (LATENT_UNET | {"conv_in_kernel": 5, "conv_out_kernel": 1}, {}),
    "gated attention": (LATENT_UNET | {"attention_type": "gated"}, {}),
}
QUICK = ("learned time", "one width for each block")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS]
)
def test_a_unet_of_this_config_equals_eager_pytorch(name: str, tmp_path: Path) -> None:
    config, conditioning = CONFIGS[name]
    eager = new_unet(config)
    eager.save_pretrained(tmp_path / "model")
    offcut.build(tmp_path / "model", tmp_path / "b", engine="onnxruntime")
    unet = offcut.UNet.load(tmp_path / "b", threads=1)
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, eager.config.in_channels, 16, 16, generator=generator)
    if "cross_attention_dim" in config:
        conditioning = {
            "encoder_hidden_states": torch.randn(2, 7, LATENT_UNET["cross_attention_dim"], generator=generator),
            **conditioning,
        }
    for timestep in (torch.tensor([500, 20]), torch.tensor(7)):
        with torch.no_grad():
            expected = eager(sample, timestep, **conditioning).sample
        actual = unet(sample, timestep, **conditioning).sample
        assert (actual - expected).norm() / expected.norm() < 1e-5
    unet.close()


@pytest.mark.parametrize(
    "config",
    [
        PIXEL_UNET | {"class_embed_type": "timestep"},
        LATENT_UNET | {"class_embed_type": "identity"},
        LATENT_UNET | {"class_embed_type": "simple_projection", "projection_class_embeddings_input_dim": 24},
        LATENT_UNET | {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    ],
    ids=lambda config: str(config.get("class_embed_type") or config.get("addition_embed_type")),
)
def test_other_configs_are_refused_before_the_build(config: dict[str, Any], tmp_path: Path) -> None:
    new_unet(config).save_pretrained(tmp_path / "model")
    with pytest.raises(ModelError, match="cannot be exported yet"):
        offcut.build(tmp_path / "model", tmp_path / "b", engine="onnxruntime")
    assert not (tmp_path / "b" / "offcut.json").exists()
