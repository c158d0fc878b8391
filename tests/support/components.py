"""Small components of diffusers' pipelines, with random weights, and configs of UNets. Each component is made once."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch

from . import videos
from .models import LATENT_UNET, PIXEL_UNET, new_unet, save_tokenizer, text_to_latent_parts

__all__ = ["PIXEL_UNET", "TEXT_UNET", "XL_UNET"]

TEXT_UNET = LATENT_UNET
_XL = {
    "cross_attention_dim": 16 + 24,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 20,
}
XL_UNET = TEXT_UNET | _XL
MOTION_UNET = videos.UNETS["animatediff"]
XL_MOTION_UNET = MOTION_UNET | _XL
VIDEO_UNET = videos.UNETS["svd"]
UNET_3D = videos.UNETS["text-to-video"]
KOLORS_UNET = TEXT_UNET | {
    "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 32,
}

Make = Callable[[], Any]


def _once(make: Make) -> Make:
    """Return a function that makes a component at its first call, from seed 0, and returns it at every call."""

    @functools.cache
    def component() -> Any:
        torch.manual_seed(0)
        made = make()
        return made.eval() if isinstance(made, torch.nn.Module) else made

    return component


@_once
def tokenizer() -> Any:
    return save_tokenizer(Path(tempfile.mkdtemp()))


@_once
def stable_diffusion() -> dict[str, Any]:
    """Return VAE, text encoder and tokenizer; latents have a quarter of the image's sides."""
    parts = text_to_latent_parts(Path(tempfile.mkdtemp()), width=16)
    return {name: parts[name] for name in ("vae", "text_encoder", "tokenizer")}


def _clip_text(width: int, projection: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    settings = {**stable_diffusion()["text_encoder"].config.to_dict(), "hidden_size": width}
    return CLIPTextModelWithProjection(CLIPTextConfig(**{**settings, "projection_dim": projection}))


second_text_encoder = _once(lambda: _clip_text(24, 20))


@_once
def image_processor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor()


@_once
def clip_processor() -> Any:
    from transformers import CLIPProcessor

    return CLIPProcessor(image_processor(), tokenizer())


@_once
def depth_vae() -> Any:
    """Return a VAE of LDM3D, which decodes an image and its depth."""
    config = stable_diffusion()["vae"].config
    return diffusers.AutoencoderKL.from_config({**config, "in_channels": 6, "out_channels": 6})


image_encoder = _once(videos.image_encoder)
motion_adapter = _once(videos.motion_adapter)
video_vae = _once(videos.video_vae)
video_scheduler = videos.video_scheduler


@_once
def _roberta() -> Any:
    from diffusers.pipelines.deprecated.alt_diffusion.modeling_roberta_series import (
        RobertaSeriesConfig,
        RobertaSeriesModelWithTransformation,
    )

    return RobertaSeriesModelWithTransformation(
        RobertaSeriesConfig(
            vocab_size=len(tokenizer()),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=16,
            project_dim=16,
            max_position_embeddings=32,
            pad_token_id=0,
        )
    )


ALT_DIFFUSION: dict[str, Make] = {"text_encoder": _roberta}


@_once
def image_project() -> Any:
    from diffusers.pipelines.stable_diffusion import CLIPImageProjection

    return CLIPImageProjection(hidden_size=16)


@_once
def example_encoder() -> Any:
    """Return the image encoder of Paint by Example."""
    from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
    from transformers import CLIPVisionConfig

    return PaintByExampleImageEncoder(CLIPVisionConfig(**videos.VISION), proj_size=16)


@_once
def depth_estimator() -> Any:
    from transformers import DPTConfig, DPTForDepthEstimation

    return DPTForDepthEstimation(
        DPTConfig(
            hidden_size=16,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=16,
            image_size=32,
            patch_size=16,
            neck_hidden_sizes=[4, 4, 4, 4],
            fusion_hidden_size=4,
            backbone_out_indices=[0, 1, 2, 3],
        )
    )


def _controlnet(kind: Any, config: Any) -> Any:
    """Return a ControlNet whose outputs are not zero, like those of a trained one."""
    net = kind.from_unet(new_unet(config), conditioning_embedding_out_channels=(8, 16, 16))
    with torch.no_grad():
        for part in (net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
            for parameter in part.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return net


controlnet = _once(lambda: _controlnet(diffusers.ControlNetModel, TEXT_UNET))
xl_controlnet = _once(lambda: _controlnet(diffusers.ControlNetModel, XL_UNET))


@_once
def xl_union_controlnet() -> Any:
    torch.manual_seed(0)
    settings = {key: value for key, value in XL_UNET.items() if key not in ("sample_size", "up_block_types")}
    return diffusers.ControlNetUnionModel(
        **settings,
        conditioning_embedding_out_channels=(8, 16, 16),
        num_trans_channel=16,
        num_trans_head=2,
        num_proj_channel=16,
    )


controlnet_xs = _once(lambda: diffusers.ControlNetXSAdapter.from_unet(new_unet(TEXT_UNET), size_ratio=0.5))
xl_controlnet_xs = _once(lambda: diffusers.ControlNetXSAdapter.from_unet(new_unet(XL_UNET), size_ratio=0.5))


@_once
def t2i_adapter() -> Any:
    return diffusers.T2IAdapter(
        in_channels=3, channels=[16, 32], num_res_blocks=1, downscale_factor=4, adapter_type="full_adapter"
    )


@_once
def vqvae() -> Any:
    return diffusers.VQModel(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=3,
        norm_num_groups=4,
        num_vq_embeddings=8,
    )


@_once
def _ldm_bert() -> Any:
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel

    return LDMBertModel(
        LDMBertConfig(
            vocab_size=len(tokenizer()),
            d_model=16,
            encoder_layers=1,
            encoder_ffn_dim=16,
            encoder_attention_heads=2,
            head_dim=8,
            max_position_embeddings=77,
        )
    )


LDM_TEXT: dict[str, Make] = {"bert": _ldm_bert, "vqvae": lambda: stable_diffusion()["vae"]}


@_once
def _kolors_text_encoder() -> Any:
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel

    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=64,
        hidden_size=32,
        ffn_hidden_size=32,
        kv_channels=8,
        num_attention_heads=4,
        seq_length=256,
        add_qkv_bias=True,
        multi_query_attention=True,
        original_rope=True,
    )
    model = ChatGLMModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


class _KolorsTokenizer:
    """Tokens of a text as Kolors' pipeline takes them: letters, padded on the left."""

    def __call__(self, prompt: list[str] | str, *, max_length: int, **_: Any) -> Any:
        from transformers import BatchEncoding

        texts = [prompt] if isinstance(prompt, str) else prompt
        ids = torch.zeros(len(texts), max_length, dtype=torch.long)
        for row, text in zip(ids, texts, strict=True):
            for index, letter in enumerate(text, start=max_length - len(text)):
                row[index] = 1 + ord(letter) % 63
        positions = torch.arange(max_length).repeat(len(texts), 1)
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions})


KOLORS: dict[str, Make] = {"text_encoder": _kolors_text_encoder, "tokenizer": _KolorsTokenizer}


@_once
def _image_normalizer() -> Any:
    from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer

    return StableUnCLIPImageNormalizer(embedding_dim=16)


@_once
def _prior() -> Any:
    return diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=8, embedding_dim=16, num_embeddings=16, num_layers=1
    )


UNCLIP: dict[str, Make] = {
    "image_normalizer": _image_normalizer,
    "image_noising_scheduler": lambda: diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
}
UNCLIP_PRIOR: dict[str, Make] = {
    "prior_tokenizer": tokenizer,
    "prior_text_encoder": _once(lambda: _clip_text(16, 16)),
    "prior": _prior,
    "prior_scheduler": lambda: diffusers.UnCLIPScheduler(
        variance_type="fixed_small_log", prediction_type="sample", num_train_timesteps=1000, clip_sample_range=5.0
    ),
}


class _Mel(diffusers.ConfigMixin, diffusers.SchedulerMixin):
    """Stands for the conversion of spectrograms to sound, which needs librosa."""

    config_name = "mel_config.json"
    x_res, hop_length = 16, 512

    def get_sample_rate(self) -> int:
        return 22050

    def image_to_audio(self, image: Any) -> Any:
        import numpy as np

        return np.asarray(image).reshape(-1)


AUDIO: dict[str, Make] = {"mel": _Mel, "vqvae": lambda: None}
