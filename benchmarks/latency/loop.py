"""The measured work: a diffusers pipeline's denoising loop from given embeddings and latents, and whole calls of it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engines.bundle.bundle import Bundle
from ...exporter.families import example_dims
from ...runtime.text_to_image import scheduler_named
from . import video
from .case import Case
from .pipelines import PIPELINES, pipeline_name

if TYPE_CHECKING:
    import torch

INPUTS = "inputs.safetensors"

_GIVEN = (
    "prompt embeddings and initial latents given and the latent returned: the scheduler's set-up and steps, guidance "
    "and UNet calls lie inside, text encoder and VAE outside"
)


def clock(case: Case) -> str:
    """What is read, and what lies between its two readings."""
    read = "CUDA events" if case.device.startswith("cuda") else "the host's monotonic clock"
    given = _GIVEN if case.frames is None else video.GIVEN
    return (
        f"{read}; a loop is one call of the diffusers pipeline with {given}; a short loop that is not measured comes "
        "before each"
    )


def build_pipeline(case: Case, bundle: Bundle, unet: Any, dtype: torch.dtype) -> Any:
    """The pipeline around a UNet, with the case's scheduler; its other parts only where the case asks for images."""
    import diffusers

    pipeline = getattr(diffusers, pipeline_name(bundle))
    if case.end_to_end:
        bundle.verify_files(bundle.manifest.parts)
        given = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        given = given if "safety_checker" in inspect.signature(pipeline).parameters else {}
        pipe = pipeline.from_pretrained(
            bundle.path, unet=unet, torch_dtype=dtype, variant=_variant(bundle), local_files_only=True, **given
        )
    else:
        parts: dict[str, Any] = {
            each.name: None if each.default is inspect.Parameter.empty else each.default
            for each in inspect.signature(pipeline).parameters.values()
        }
        if "requires_safety_checker" in parts:
            parts["requires_safety_checker"] = False
        pipe = pipeline(**{**parts, "unet": unet, "scheduler": _own_scheduler(bundle)})
    pipe.scheduler = scheduler_named(pipe.scheduler, case.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _own_scheduler(bundle: Bundle) -> Any:
    import diffusers

    pipeline = PIPELINES[pipeline_name(bundle)]
    kind = getattr(diffusers, pipeline.scheduler)
    folder = bundle.path / "scheduler"
    if bundle.manifest.pipeline is None or not folder.is_dir():
        return kind(**pipeline.noise)
    bundle.verify_files([name for name in bundle.manifest.parts if name.startswith("scheduler/")])
    return kind.from_pretrained(bundle.path, subfolder="scheduler", local_files_only=True)


def prepare_inputs(case: Case, bundle: Bundle) -> dict[str, Any]:
    """Encode the prompt or the image, draw the latents, and write both for all contestants, in fp32.

    Without an encoder in the bundle the embeddings are random, of its usual length.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator("cpu").manual_seed(case.seed)
    scale = vae_scale(bundle)
    latent = (case.height // scale, case.width // scale)
    if case.frames is None:
        inputs = _text_inputs(case, bundle, latent, generator)
    else:
        inputs = video.random_inputs(case, bundle, latent, generator)
        if _has(bundle, "image_encoder"):
            inputs |= video.encode(_encoders(bundle), case, generator)
    save_file({name: tensor.float().contiguous() for name, tensor in inputs.items()}, Path(case.folder) / INPUTS)
    return {"inputs": {name: list(tensor.shape) for name, tensor in inputs.items()}}


def _text_inputs(case: Case, bundle: Bundle, latent: tuple[int, int], generator: Any) -> dict[str, Any]:
    import torch

    config = bundle.unet_config
    inputs = {"latents": torch.randn((case.images, config["in_channels"], *latent), generator=generator)}
    if _has(bundle, "text_encoder"):
        pipe = _encoders(bundle, vae=None)
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        with torch.no_grad():
            encoded = pipe.encode_prompt(
                case.prompt, device="cpu", num_images_per_prompt=case.images, do_classifier_free_guidance=True
            )
        inputs |= {name: tensor for name, tensor in zip(names, encoded, strict=False) if tensor is not None}
    else:
        tokens = (case.images, 77, config["cross_attention_dim"])
        for name in ("prompt_embeds", "negative_prompt_embeds"):
            inputs[name] = torch.randn(tokens, generator=generator)
        if config.get("addition_embed_type") == "text_time":
            width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
            for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
                inputs[name] = torch.randn((case.images, width), generator=generator)
    return inputs


def _has(bundle: Bundle, encoder: str) -> bool:
    return bundle.manifest.pipeline is not None and (bundle.path / encoder).is_dir()


def _encoders(bundle: Bundle, **left_out: None) -> Any:
    """The bundle's pipeline without its UNet."""
    import diffusers

    bundle.verify_files(bundle.manifest.parts)
    pipeline = getattr(diffusers, pipeline_name(bundle))
    return pipeline.from_pretrained(bundle.path, unet=None, variant=_variant(bundle), local_files_only=True, **left_out)


def read_inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """What every contestant's loop begins with, in its dtype and on its device."""
    from safetensors.torch import load_file

    tensors = load_file(Path(case.folder) / INPUTS)
    if case.guidance <= 1:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("negative")}
    return {name: tensor.to(case.device, dtype) for name, tensor in tensors.items()}


def denoise(pipe: Any, case: Case, inputs: Mapping[str, Any], *, calls: int | None = None) -> Any:
    """One loop; the final latents [images, channels, height, width], of videos [images, frames, channels, ...].

    Args:
        calls: stop after so many steps; None for the whole loop.
    """
    if case.frames is not None:
        return video.denoise(pipe, case, inputs, calls)
    return _call(pipe, case, calls, **inputs, output_type="latent")


def draw(pipe: Any, case: Case, *, calls: int | None = None) -> Any:
    """One whole pipeline call, from the prompt or image to pictures; ``calls`` as in ``denoise``."""
    import torch

    if case.frames is not None:
        return video.draw(pipe, case, calls)
    generator = torch.Generator("cpu").manual_seed(case.seed)
    return _call(pipe, case, calls, prompt=[case.prompt] * case.images, generator=generator)


def _call(pipe: Any, case: Case, calls: int | None, **given: Any) -> Any:
    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if calls is not None and step + 1 >= calls:
            pipeline._interrupt = True  # diffusers' own way to end a loop early
        return tensors

    return pipe(
        **given,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance,
        height=case.height,
        width=case.width,
        **({} if calls is None else {"callback_on_step_end": step_ended}),
    ).images


def vae_scale(bundle: Bundle) -> int:
    """Pixels of the image for one of the latent."""
    import json

    name = "vae/config.json"
    if name not in bundle.manifest.parts:
        return 8
    bundle.verify_files([name])
    config = json.loads((bundle.path / name).read_text(encoding="utf-8"))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def call_dims(bundle: Bundle, size: int | None = None) -> dict[str, int]:
    """Dimensions of a UNet call with guidance for one image of this side in pixels; without one tiny ones."""
    dims = example_dims(bundle.unet_config)
    if size is None:
        return dims
    side = size // vae_scale(bundle)
    return dims | {"height": side, "width": side, "sequence": 77}


def _variant(bundle: Bundle) -> str | None:
    """The file name variant of the bundle's parts, where they have one."""
    variant = bundle.manifest.source.variant
    return variant if any(f".{variant}." in part for part in bundle.manifest.parts) else None
