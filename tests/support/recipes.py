"""Recipes of the survey: for each pipeline of diffusers with a UNet, a small one and a call, or why it is not made."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import diffusers
import torch
from PIL import Image

from . import components as parts
from .components import MOTION_UNET, PIXEL_UNET, TEXT_UNET, UNET_3D, VIDEO_UNET, XL_UNET

Config = Mapping[str, Any]
IMAGE = Image.linear_gradient("L").convert("RGB").resize((32, 32))
MASK = Image.new("L", (32, 32), 0)
MASK.paste(255, (8, 8, 24, 24))
FRAMES = [IMAGE.rotate(90 * turn) for turn in range(3)]


def _scheduler(name: str, **settings: Any) -> Callable[[], Any]:
    def make() -> Any:
        kind = getattr(diffusers, name, None)
        if kind is None:
            kind = getattr(importlib.import_module("diffusers.schedulers.deprecated"), name)
        return kind(**settings)

    return make


_DDIM = _scheduler("DDIMScheduler", clip_sample=False, steps_offset=1)


@dataclass(frozen=True)
class Recipe:
    """A small pipeline and one call of it.

    Attributes:
        unet: config of its UNet.
        call: arguments of the call besides the steps, the generator and the output type.
        scheduler: function that returns its scheduler.
        components: functions that return the components that are not those of Stable Diffusion.
        output: the call's ``output_type``.
        one_call_a_step: whether the UNet is called once a step, so that the timeline is that of the schedule.
        build: arguments of the build.
        refused: part of the message with which the build, ``attach`` or the call is refused; empty if the pipeline
            works.
        note: what the manual's table says besides "works" or "refused".
    """

    unet: Config
    call: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Callable[[], Any] = _DDIM
    components: Mapping[str, Callable[[], Any]] = field(default_factory=dict)
    output: str = "latent"
    one_call_a_step: bool = True
    build: Mapping[str, Any] = field(default_factory=dict)
    refused: str = ""
    note: str = ""


_SIZE = {"height": 32, "width": 32}
_TEXT = {"prompt": "a", **_SIZE}
_IMAGE = {"prompt": "a", "image": IMAGE, "strength": 0.9}
_INPAINT = {"prompt": "a", "image": IMAGE, "mask_image": MASK, **_SIZE}

# Stable Diffusion.
_SD = Recipe(TEXT_UNET, _TEXT)
_XL_PARTS = {
    "text_encoder_2": parts.second_text_encoder,
    "tokenizer_2": parts.tokenizer,
    "add_watermarker": lambda: False,
    "feature_extractor": lambda: None,
}
_XL = Recipe(XL_UNET, _TEXT, components=_XL_PARTS)
_CONTROLNET = {"controlnet": parts.controlnet}
_XL_CONTROLNET = {**_XL_PARTS, "controlnet": parts.xl_controlnet}
_XL_UNION = {**_XL_PARTS, "controlnet": parts.xl_union_controlnet}
_FOR_CONTROLNET = {"adapters": ["controlnet"]}
_FOR_ADAPTER = {"adapters": ["t2i-adapter"]}
_CONTROL = {"control_image": IMAGE}
_PAG = {
    "refused": "pag_scale=0",
    "note": "perturbed-attention guidance changes attention layers; `pag_scale=0` works",
}
_ATTENTION_MAPS = {"refused": "reads the UNet's attention maps", "note": "reads attention maps"}
_ALL_STEPS = "the schedule counts the steps that strength leaves out too"
_GRADIENTS = {
    "refused": "computes gradients through the UNet",
    "note": "computes gradients through the UNet",
}
_GLIGEN = {
    "refused": "cross_attention_kwargs={'gligen'",
    "note": "its grounding inputs (`cross_attention_kwargs`) are no inputs of the graphs",
}

_STABLE_DIFFUSION = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionImg2ImgPipeline": Recipe(TEXT_UNET, _IMAGE),
    "StableDiffusionInpaintPipeline": Recipe(TEXT_UNET | {"in_channels": 9}, _INPAINT),
    "StableDiffusionInpaintPipelineLegacy": Recipe(
        TEXT_UNET, {**_IMAGE, "mask_image": MASK}, one_call_a_step=False, note=_ALL_STEPS
    ),
    "StableDiffusionInstructPix2PixPipeline": Recipe(
        TEXT_UNET | {"in_channels": 8},
        {"prompt": "a", "image": IMAGE, "image_guidance_scale": 1.5},
        note="guidance in three parts",
    ),
    "StableDiffusionUpscalePipeline": Recipe(
        TEXT_UNET | {"in_channels": 7, "num_class_embeds": 50},
        {"prompt": "a", "image": IMAGE.resize((16, 16))},
        components={"low_res_scheduler": _scheduler("DDPMScheduler")},
    ),
    "StableDiffusionLatentUpscalePipeline": Recipe(
        TEXT_UNET | {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 16 + 128},
        {"prompt": "a", "image": torch.full((1, 4, 8, 8), 0.5)},
        _scheduler("EulerDiscreteScheduler"),
    ),
    "StableDiffusionDepth2ImgPipeline": Recipe(
        TEXT_UNET | {"in_channels": 5},
        {**_IMAGE, "depth_map": torch.linspace(0, 1, 1024).reshape(1, 32, 32)},
        components={"depth_estimator": parts.depth_estimator, "feature_extractor": parts.image_processor},
    ),
    "StableDiffusionImageVariationPipeline": Recipe(
        TEXT_UNET,
        {"image": IMAGE, **_SIZE},
        components={"image_encoder": parts.image_encoder, "feature_extractor": parts.image_processor},
    ),
    "StableDiffusionPanoramaPipeline": Recipe(
        TEXT_UNET, {"prompt": "a", "height": 32, "width": 64}, one_call_a_step=False, note="each view is a trajectory"
    ),
    "StableDiffusionLDM3DPipeline": Recipe(TEXT_UNET, _TEXT, components={"vae": parts.depth_vae}, output="np"),
    "StableDiffusionPipelineSafe": Recipe(TEXT_UNET, _TEXT, note="guidance in three parts"),
    "StableDiffusionDiffEditPipeline": Recipe(
        TEXT_UNET,
        {"prompt": "a", "mask_image": MASK.resize((8, 8)), "image_latents": torch.full((5, 4, 8, 8), 0.5)},
        components={"inverse_scheduler": _scheduler("DDIMInverseScheduler")},
        one_call_a_step=False,
        note=_ALL_STEPS,
    ),
    "CycleDiffusionPipeline": Recipe(
        TEXT_UNET,
        {"prompt": "a", "source_prompt": "b", "image": IMAGE, "strength": 0.8, "eta": 0.1},
        _scheduler("DDIMScheduler", clip_sample=False, set_alpha_to_one=False),
        one_call_a_step=False,
    ),
    "SemanticStableDiffusionPipeline": Recipe(TEXT_UNET, {**_TEXT, "editing_prompt": ["b"]}),
    "StableDiffusionModelEditingPipeline": replace(
        _SD, refused="edits the weights of the UNet's attention", note="edits the UNet's weights"
    ),
    "StableDiffusionAttendAndExcitePipeline": Recipe(TEXT_UNET, {**_TEXT, "token_indices": [1]}, **_GRADIENTS),
    "StableDiffusionPix2PixZeroPipeline": replace(_SD, **_GRADIENTS),
    "LEditsPPPipelineStableDiffusion": replace(_SD, **_ATTENTION_MAPS),
    "LEditsPPPipelineStableDiffusionXL": replace(_XL, **_ATTENTION_MAPS),
    "StableDiffusionSAGPipeline": replace(_SD, **_ATTENTION_MAPS),
    "StableDiffusionParadigmsPipeline": Recipe(
        TEXT_UNET,
        {**_TEXT, "parallel": 3},
        _scheduler("DDIMParallelScheduler", clip_sample=False),
        one_call_a_step=False,
        note="every call full, as rows of a batch are at different steps",
    ),
    "LatentConsistencyModelPipeline": Recipe(TEXT_UNET | {"time_cond_proj_dim": 16}, _TEXT, _scheduler("LCMScheduler")),
    "LatentConsistencyModelImg2ImgPipeline": Recipe(
        TEXT_UNET | {"time_cond_proj_dim": 16}, _IMAGE, _scheduler("LCMScheduler")
    ),
    "StableDiffusionGLIGENPipeline": Recipe(
        TEXT_UNET | {"attention_type": "gated"},
        {**_TEXT, "gligen_phrases": ["b"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]},
        **_GLIGEN,
    ),
    "StableDiffusionGLIGENTextImagePipeline": Recipe(
        TEXT_UNET | {"attention_type": "gated-text-image"},
        {**_TEXT, "gligen_phrases": ["b"], "gligen_boxes": [[0.1, 0.1, 0.5, 0.5]]},
        components={
            "processor": parts.clip_processor,
            "image_encoder": parts.image_encoder,
            "image_project": parts.image_project,
        },
        **_GLIGEN,
    ),
    "StableUnCLIPImg2ImgPipeline": Recipe(
        TEXT_UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32},
        {"prompt": "a", "image": IMAGE, **_SIZE},
        components=parts.UNCLIP | {"image_encoder": parts.image_encoder, "feature_extractor": parts.image_processor},
    ),
    "StableUnCLIPPipeline": Recipe(
        TEXT_UNET | {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 32},
        {"prompt": "a", "prior_num_inference_steps": 2, **_SIZE},
        components=parts.UNCLIP | parts.UNCLIP_PRIOR,
    ),
    "PaintByExamplePipeline": Recipe(
        TEXT_UNET | {"in_channels": 9},
        {"image": IMAGE, "mask_image": MASK, "example_image": IMAGE, **_SIZE},
        components={"image_encoder": parts.example_encoder, "feature_extractor": parts.image_processor},
    ),
    "AltDiffusionPipeline": Recipe(TEXT_UNET, _TEXT, components=parts.ALT_DIFFUSION),
    "AltDiffusionImg2ImgPipeline": Recipe(TEXT_UNET, _IMAGE, components=parts.ALT_DIFFUSION),
    "MarigoldDepthPipeline": Recipe(
        TEXT_UNET | {"in_channels": 8}, {"image": IMAGE, "processing_resolution": 32}, output="np"
    ),
    "MarigoldNormalsPipeline": Recipe(
        TEXT_UNET | {"in_channels": 8}, {"image": IMAGE, "processing_resolution": 32}, output="np"
    ),
    "MarigoldIntrinsicsPipeline": Recipe(
        TEXT_UNET | {"in_channels": 12, "out_channels": 8},
        {"image": IMAGE, "processing_resolution": 32},
        components={
            "prediction_type": lambda: "intrinsics",
            "target_properties": lambda: {"target_names": ["albedo", "material"]},
        },
        output="np",
    ),
    "StableDiffusionPAGPipeline": replace(_SD, **_PAG),
    "StableDiffusionPAGImg2ImgPipeline": Recipe(TEXT_UNET, _IMAGE, **_PAG),
    "StableDiffusionPAGInpaintPipeline": Recipe(TEXT_UNET | {"in_channels": 9}, _INPAINT, **_PAG),
}

_STABLE_DIFFUSION_XL = {
    "StableDiffusionXLPipeline": _XL,
    "StableDiffusionXLImg2ImgPipeline": Recipe(XL_UNET, _IMAGE, components=_XL_PARTS),
    "StableDiffusionXLInpaintPipeline": Recipe(XL_UNET | {"in_channels": 9}, _INPAINT, components=_XL_PARTS),
    "StableDiffusionXLInstructPix2PixPipeline": Recipe(
        XL_UNET | {"in_channels": 8},
        {"prompt": "a", "image": IMAGE, "image_guidance_scale": 1.5, **_SIZE},
        components=_XL_PARTS,
        note="guidance in three parts",
    ),
    "StableDiffusionXLPAGPipeline": replace(_XL, **_PAG),
    "StableDiffusionXLPAGImg2ImgPipeline": Recipe(XL_UNET, _IMAGE, components=_XL_PARTS, **_PAG),
    "StableDiffusionXLPAGInpaintPipeline": Recipe(XL_UNET | {"in_channels": 9}, _INPAINT, components=_XL_PARTS, **_PAG),
    "KolorsPipeline": Recipe(parts.KOLORS_UNET, _TEXT, components=parts.KOLORS),
    "KolorsImg2ImgPipeline": Recipe(parts.KOLORS_UNET, _IMAGE, components=parts.KOLORS),
    "KolorsPAGPipeline": Recipe(parts.KOLORS_UNET, _TEXT, components=parts.KOLORS, **_PAG),
}

_CONTROLNETS = {
    "StableDiffusionControlNetPipeline": Recipe(
        TEXT_UNET, {**_TEXT, "image": IMAGE}, components=_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionControlNetImg2ImgPipeline": Recipe(
        TEXT_UNET, {**_IMAGE, **_CONTROL}, components=_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionControlNetInpaintPipeline": Recipe(
        TEXT_UNET, {**_INPAINT, **_CONTROL}, components=_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionControlNetPAGPipeline": Recipe(
        TEXT_UNET, {**_TEXT, "image": IMAGE}, components=_CONTROLNET, build=_FOR_CONTROLNET, **_PAG
    ),
    "StableDiffusionControlNetPAGInpaintPipeline": Recipe(
        TEXT_UNET, {**_INPAINT, **_CONTROL}, components=_CONTROLNET, build=_FOR_CONTROLNET, **_PAG
    ),
    "StableDiffusionXLControlNetPipeline": Recipe(
        XL_UNET, {**_TEXT, "image": IMAGE}, components=_XL_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionXLControlNetImg2ImgPipeline": Recipe(
        XL_UNET, {**_IMAGE, **_CONTROL}, components=_XL_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionXLControlNetInpaintPipeline": Recipe(
        XL_UNET, {**_INPAINT, **_CONTROL}, components=_XL_CONTROLNET, build=_FOR_CONTROLNET
    ),
    "StableDiffusionXLControlNetPAGPipeline": Recipe(
        XL_UNET, {**_TEXT, "image": IMAGE}, components=_XL_CONTROLNET, build=_FOR_CONTROLNET, **_PAG
    ),
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": Recipe(
        XL_UNET, {**_IMAGE, **_CONTROL}, components=_XL_CONTROLNET, build=_FOR_CONTROLNET, **_PAG
    ),
    "StableDiffusionXLControlNetUnionPipeline": Recipe(
        XL_UNET,
        {**_TEXT, "control_image": [IMAGE], "control_mode": [0]},
        components=_XL_UNION,
        build=_FOR_CONTROLNET,
    ),
    "StableDiffusionXLControlNetUnionImg2ImgPipeline": Recipe(
        XL_UNET,
        {**_IMAGE, "control_image": [IMAGE], "control_mode": [0]},
        components=_XL_UNION,
        build=_FOR_CONTROLNET,
    ),
    "StableDiffusionXLControlNetUnionInpaintPipeline": Recipe(
        XL_UNET,
        {**_INPAINT, "control_image": [IMAGE], "control_mode": [0]},
        components=_XL_UNION,
        build=_FOR_CONTROLNET,
    ),
    "StableDiffusionAdapterPipeline": Recipe(
        TEXT_UNET, {**_TEXT, "image": IMAGE}, components={"adapter": parts.t2i_adapter}, build=_FOR_ADAPTER
    ),
    "StableDiffusionXLAdapterPipeline": Recipe(
        XL_UNET, {**_TEXT, "image": IMAGE}, components={**_XL_PARTS, "adapter": parts.t2i_adapter}, build=_FOR_ADAPTER
    ),
    "StableDiffusionControlNetXSPipeline": Recipe(
        TEXT_UNET,
        {**_TEXT, "image": IMAGE},
        components={"controlnet": parts.controlnet_xs},
        refused="runs its ControlNet inside the UNet's blocks",
        note="runs its ControlNet inside the UNet's blocks",
    ),
    "StableDiffusionXLControlNetXSPipeline": Recipe(
        XL_UNET,
        {**_TEXT, "image": IMAGE},
        components={**_XL_PARTS, "controlnet": parts.xl_controlnet_xs},
        refused="runs its ControlNet inside the UNet's blocks",
        note="runs its ControlNet inside the UNet's blocks",
    ),
}

_VIDEO_CALL = {"prompt": "a", "num_frames": 3, **_SIZE}
_MOTION = {"motion_adapter": parts.motion_adapter}
_ANIMATEDIFF = Recipe(MOTION_UNET, _VIDEO_CALL, components=_MOTION)
_NO_VIDEO_CONTROLNET = {
    "build": _FOR_CONTROLNET,
    "refused": "a UNetMotionModel takes no adapter called 'controlnet'",
    "note": "ControlNets on videos are not inputs of the graphs",
}
_VIDEOS = {
    "AnimateDiffPipeline": _ANIMATEDIFF,
    "AnimateDiffControlNetPipeline": replace(_ANIMATEDIFF, **_NO_VIDEO_CONTROLNET),
    "AnimateDiffSparseControlNetPipeline": replace(_ANIMATEDIFF, **_NO_VIDEO_CONTROLNET),
    "AnimateDiffVideoToVideoControlNetPipeline": replace(_ANIMATEDIFF, **_NO_VIDEO_CONTROLNET),
    "AnimateDiffVideoToVideoPipeline": Recipe(
        MOTION_UNET, {"video": FRAMES, "prompt": "a", "strength": 0.9, **_SIZE}, components=_MOTION
    ),
    "AnimateDiffPAGPipeline": replace(_ANIMATEDIFF, **_PAG),
    "AnimateDiffSDXLPipeline": Recipe(
        parts.XL_MOTION_UNET, _VIDEO_CALL, components={**_XL_PARTS, "motion_adapter": parts.motion_adapter}
    ),
    "PIAPipeline": Recipe(MOTION_UNET | {"in_channels": 9}, {**_VIDEO_CALL, "image": IMAGE}, components=_MOTION),
    "StableVideoDiffusionPipeline": Recipe(
        VIDEO_UNET,
        {"image": IMAGE, "num_frames": 3, **_SIZE},
        parts.video_scheduler,
        components={
            "vae": parts.video_vae,
            "image_encoder": parts.image_encoder,
            "feature_extractor": parts.image_processor,
        },
    ),
    "TextToVideoSDPipeline": Recipe(UNET_3D, _VIDEO_CALL),
    "VideoToVideoSDPipeline": Recipe(
        UNET_3D, {"prompt": "a", "video": FRAMES, "strength": 0.9}, one_call_a_step=False, note=_ALL_STEPS
    ),
    "TextToVideoZeroPipeline": Recipe(
        TEXT_UNET,
        {**_TEXT, "video_length": 3, "t0": 3, "t1": 4},
        one_call_a_step=False,
        build={"attention": "cross-frame"},
        note="first frame and video are two trajectories",
    ),
    "TextToVideoZeroSDXLPipeline": Recipe(
        XL_UNET,
        {**_TEXT, "video_length": 3, "t0": 3, "t1": 4},
        components=_XL_PARTS,
        one_call_a_step=False,
        build={"attention": "cross-frame"},
        note="first frame and video are two trajectories",
    ),
}

_OTHERS = {
    "DDPMPipeline": Recipe(PIXEL_UNET, scheduler=_scheduler("DDPMScheduler"), output="np"),
    "DDIMPipeline": Recipe(PIXEL_UNET, output="np"),
    "PNDMPipeline": Recipe(PIXEL_UNET, scheduler=_scheduler("PNDMScheduler"), output="np"),
    "ConsistencyModelPipeline": Recipe(PIXEL_UNET, scheduler=_scheduler("CMStochasticIterativeScheduler"), output="np"),
    "ScoreSdeVePipeline": Recipe(
        PIXEL_UNET | {"time_embedding_type": "fourier"},
        scheduler=lambda: diffusers.schedulers.ScoreSdeVeScheduler(),
        output="np",
        one_call_a_step=False,
        note="corrector and predictor are two trajectories",
    ),
    "KarrasVePipeline": Recipe(
        PIXEL_UNET,
        scheduler=_scheduler("KarrasVeScheduler"),
        output="np",
        one_call_a_step=False,
        note="calls beyond the number of steps are full",
    ),
    "RePaintPipeline": Recipe(
        PIXEL_UNET,
        {"image": IMAGE, "mask_image": MASK, "jump_length": 2, "jump_n_sample": 2},
        _scheduler("RePaintScheduler"),
        output="np",
        one_call_a_step=False,
    ),
    "LDMPipeline": Recipe(PIXEL_UNET, components={"vqvae": parts.vqvae}, output="np"),
    "LDMSuperResolutionPipeline": Recipe(
        PIXEL_UNET | {"in_channels": 6}, {"image": IMAGE}, components={"vqvae": parts.vqvae}, output="np"
    ),
    "LDMTextToImagePipeline": Recipe(
        TEXT_UNET, {"prompt": "a", "height": 64, "width": 64}, components=parts.LDM_TEXT, output="np"
    ),
    "AudioDiffusionPipeline": Recipe(
        PIXEL_UNET | {"in_channels": 1, "out_channels": 1}, {"steps": 7}, components=parts.AUDIO
    ),
}

_KANDINSKY = Recipe(
    TEXT_UNET
    | {
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": 16,
        "addition_embed_type": "text_image",
        "cross_attention_dim": 32,
    },
    refused="cannot be exported yet",
    note="its image projections are no inputs of the graphs",
)
_KANDINSKY_2_2 = replace(
    _KANDINSKY,
    unet=TEXT_UNET | {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 16, "addition_embed_type": "image"},
)
_KANDINSKY_HINT = replace(
    _KANDINSKY,
    unet=TEXT_UNET
    | {
        "in_channels": 8,
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": 16,
        "addition_embed_type": "image_hint",
    },
)
_IF = Recipe(
    TEXT_UNET | {"in_channels": 3, "out_channels": 6, "addition_embed_type": "text", "encoder_hid_dim": 8},
    refused="cannot be exported yet",
    note="its text pooling is no part of the graphs",
)
_IF_LARGE = replace(_IF, unet={**_IF.unet, "in_channels": 6, "class_embed_type": "timestep"})
_AUDIO = Recipe(
    TEXT_UNET
    | {
        "class_embed_type": "simple_projection",
        "projection_class_embeddings_input_dim": 8,
        "class_embeddings_concat": True,
        "cross_attention_dim": (16, 32),
    },
    refused="cross_attention_dim differs from block to block",
    note="its class embeddings are no inputs of the graphs",
)
_REFUSED_BY_CONFIG = {
    **dict.fromkeys(
        (
            "KandinskyPipeline",
            "KandinskyImg2ImgPipeline",
            "KandinskyInpaintPipeline",
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintCombinedPipeline",
        ),
        _KANDINSKY,
    ),
    **dict.fromkeys(
        (
            "KandinskyV22Pipeline",
            "KandinskyV22Img2ImgPipeline",
            "KandinskyV22InpaintPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintCombinedPipeline",
        ),
        _KANDINSKY_2_2,
    ),
    **dict.fromkeys(
        ("KandinskyV22ControlnetPipeline", "KandinskyV22ControlnetImg2ImgPipeline"),
        _KANDINSKY_HINT,
    ),
    **dict.fromkeys(("IFPipeline", "IFImg2ImgPipeline", "IFInpaintingPipeline"), _IF),
    **dict.fromkeys(
        ("IFSuperResolutionPipeline", "IFImg2ImgSuperResolutionPipeline", "IFInpaintingSuperResolutionPipeline"),
        _IF_LARGE,
    ),
    **dict.fromkeys(("AudioLDMPipeline", "MusicLDMPipeline"), _AUDIO),
    "AudioLDM2Pipeline": Recipe(
        TEXT_UNET | {"_class_name": "AudioLDM2UNet2DConditionModel"},
        refused="AudioLDM2UNet2DConditionModel",
        note="`AudioLDM2UNet2DConditionModel` is not among offcut's families",
    ),
}

RECIPES: dict[str, Recipe] = {
    **_STABLE_DIFFUSION,
    **_STABLE_DIFFUSION_XL,
    **_CONTROLNETS,
    **_VIDEOS,
    **_OTHERS,
    **_REFUSED_BY_CONFIG,
}

_BLIP = "its query transformer needs the tokenizer of BERT from the hub"
NOT_MADE = {"BlipDiffusionPipeline": _BLIP, "BlipDiffusionControlNetPipeline": _BLIP}
"""Pipelines that the survey cannot make, each with the reason."""
