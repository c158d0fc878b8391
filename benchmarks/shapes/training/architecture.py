"""The three networks and the noise schedule, sized so that all weights in fp16 stay under 12 MB."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .. import scenes
from . import tokenizer

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

TEXT_WIDTH = 128
LATENT_CHANNELS = 4
LATENT_SIZE = scenes.IMAGE_SIZE // 4
"""Height and width of a latent: the autoencoder halves the picture twice."""


def new_vae() -> AutoencoderKL:
    """Return an untrained autoencoder: pictures [B, 3, 64, 64] in [-1, 1] to latents [B, 4, 16, 16] and back."""
    import torch
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        sample_size=scenes.IMAGE_SIZE,
        block_out_channels=(24, 32, 48),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
    )
    # The posterior begins with a small variance: at exp(0), its noise would hide the signal from the decoder.
    torch.nn.init.constant_(vae.quant_conv.bias[LATENT_CHANNELS:].detach(), -6.0)
    return vae


def new_text_encoder() -> CLIPTextModel:
    """Return an untrained CLIP text model: token ids [B, 32] to hidden states [B, 32, 128]."""
    from transformers import CLIPTextConfig, CLIPTextModel

    size = len(tokenizer.vocabulary()[0])
    config = CLIPTextConfig(
        vocab_size=size,
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        projection_dim=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.MAX_LENGTH,
        hidden_act="quick_gelu",
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    return CLIPTextModel(config)


def new_unet() -> UNet2DConditionModel:
    """Return an untrained UNet with Stable Diffusion 1.5's block layout: four levels, 12 skip connections."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=(*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
        block_out_channels=(48, 64, 80, 80),
        layers_per_block=2,
        norm_num_groups=16,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 4, 5, 5),  # despite its name the number of heads; each head has 16 channels
    )


def new_scheduler() -> DDIMScheduler:
    """Return the scheduler: v-prediction, and a noisiest step with an SNR of 2e-4, so that sampling starts from noise.

    "trailing" spacing makes sampling begin at the noisiest step, for every number of steps.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )
