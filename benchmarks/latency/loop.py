"""The measured work: a diffusers pipeline's denoising loop from prepared tensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engines.bundle.bundle import Bundle
from ...engines.bundle.view import view
from ...exporter.families import example_dims
from ...runtime.text_to_image import scheduler_named
from . import video
from .case import Case
from .pipelines import PIPELINES, pipeline_name

if TYPE_CHECKING:
    import torch

INPUTS = "inputs.safetensors"

_IMAGE_LOOP = (
    "given prompt embeddings and initial latents; the time contains the scheduler's set-up and steps, guidance and "
    "UNet calls, but not text encoder and VAE"
)


def clock(case: Case) -> str:
    """Return a description of the clock, and of the work between its two readings."""
    source = "CUDA events" if case.device.startswith("cuda") else "the host's monotonic clock"
    inside = _IMAGE_LOOP if case.frames is None else video.VIDEO_LOOP
    return (
        f"{source}; a loop is one call of the diffusers pipeline with {inside}; before each there is a "
        "short loop that is not measured"
    )


def build_pipeline(case: Case, bundle: Bundle, unet: Any) -> Any:
    """Return the pipeline around a UNet, with the case's scheduler and without other components."""
    import diffusers

    pipeline_class = getattr(diffusers, pipeline_name(bundle))
    parameters = inspect.signature(pipeline_class).parameters
    components: dict[str, Any] = {
        name: None if value.default is inspect.Parameter.empty else value.default for name, value in parameters.items()
    }
    if "requires_safety_checker" in components:
        components["requires_safety_checker"] = False
    pipe = pipeline_class(**{**components, "unet": unet, "scheduler": _bundle_scheduler(bundle)})
    pipe.scheduler = scheduler_named(pipe.scheduler, case.scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _bundle_scheduler(bundle: Bundle) -> Any:
    import diffusers

    pipeline = PIPELINES[pipeline_name(bundle)]
    kind = getattr(diffusers, pipeline.scheduler)
    folder = bundle.path / "scheduler"
    if bundle.manifest.pipeline is None or not folder.is_dir():
        return kind(**pipeline.noise)
    with view(bundle, [name for name in bundle.manifest.parts if name.startswith("scheduler/")]) as files:
        return kind.from_pretrained(files, subfolder="scheduler", local_files_only=True)


def prepare_inputs(case: Case, bundle: Bundle) -> dict[str, list[int]]:
    """Encode the prompt or the image, create the latents, and write both in fp32 for all contestants.

    A bundle without an encoder gets random embeddings of the usual length.

    Returns:
        The tensors' shapes by name.
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
    return {name: list(tensor.shape) for name, tensor in inputs.items()}


def _text_inputs(case: Case, bundle: Bundle, latent: tuple[int, int], generator: Any) -> dict[str, Any]:
    import torch

    config = bundle.unet_config
    inputs = {"latents": torch.randn((case.images, config["in_channels"], *latent), generator=generator)}
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    if _has(bundle, "text_encoder"):
        pipe = _encoders(bundle, vae=None)
        with torch.no_grad():
            encoded = pipe.encode_prompt(
                case.prompt, device="cpu", num_images_per_prompt=case.images, do_classifier_free_guidance=True
            )
        return inputs | {name: tensor for name, tensor in zip(names, encoded, strict=False) if tensor is not None}
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(names[:2], (case.images, 77, config["cross_attention_dim"]))
    if config.get("addition_embed_type") == "text_time":
        width = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        shapes |= dict.fromkeys(names[2:], (case.images, width))
    return inputs | {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _has(bundle: Bundle, encoder: str) -> bool:
    return bundle.manifest.pipeline is not None and (bundle.path / encoder).is_dir()


def _encoders(bundle: Bundle, **left_out: None) -> Any:
    """Return the bundle's pipeline without its UNet and without the components in ``left_out``."""
    import diffusers

    kind = getattr(diffusers, pipeline_name(bundle))
    with view(bundle, bundle.manifest.parts) as files:
        return kind.from_pretrained(files, unet=None, local_files_only=True, **left_out)


def read_inputs(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Return the input tensors of the loop in this dtype, on the case's device."""
    from safetensors.torch import load_file

    tensors = load_file(Path(case.folder) / INPUTS)
    if case.guidance <= 1:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("negative")}
    return {name: tensor.to(case.device, dtype) for name, tensor in tensors.items()}


class _EnoughSteps(Exception):
    """The loop has run enough steps; diffusers' video pipeline has no other way to end early."""

    def __init__(self, latents: Any) -> None:
        super().__init__()
        self.latents = latents


def denoise(pipe: Any, case: Case, inputs: Mapping[str, Any], *, calls: int | None = None) -> Any:
    """Run one denoising loop.

    Args:
        calls: number of steps after which the loop ends; None runs the whole loop.

    Returns:
        The final latents: [images, channels, height, width], or [videos, frames, channels, height, width].
    """
    import torch

    try:
        if case.frames is None:
            return _call(pipe, case, calls, **inputs, output_type="latent")
        empty = torch.zeros((case.images, 3, case.height, case.width), device=case.device)
        with video.prepared_encodings(pipe, inputs):
            return _call(pipe, case, calls, image=empty, latents=inputs["latents"], output_type="latent")
    except _EnoughSteps as enough:
        return enough.latents


def _call(pipe: Any, case: Case, calls: int | None, **arguments: Any) -> Any:
    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if calls is not None and step + 1 >= calls:
            if case.frames is not None:
                raise _EnoughSteps(tensors["latents"])
            pipeline._interrupt = True  # ends the loop of an image pipeline
        return tensors

    if case.frames is None:
        arguments["guidance_scale"] = case.guidance
    else:
        arguments |= {"num_frames": case.frames, "min_guidance_scale": 1.0, "max_guidance_scale": case.guidance}
    output = pipe(
        **arguments,
        num_inference_steps=case.steps,
        height=case.height,
        width=case.width,
        **({} if calls is None else {"callback_on_step_end": step_ended}),
    )
    return output.images if case.frames is None else output.frames


def vae_scale(bundle: Bundle) -> int:
    """Return the ratio of the image's height and width to those of the latent."""
    name = "vae/config.json"
    if name not in bundle.manifest.parts:
        return 8
    bundle.verify_files([name])
    config = json.loads((bundle.path / name).read_text(encoding="utf-8"))
    return int(2 ** (len(config["block_out_channels"]) - 1))


def call_dims(bundle: Bundle, size: int | None = None) -> dict[str, int]:
    """Return the dimensions of a guided UNet call for one square image, or tiny dimensions.

    Args:
        size: side of the image in pixels; None for tiny dimensions.
    """
    dims = example_dims(bundle.unet_config)
    if size is None:
        return dims
    side = size // vae_scale(bundle)
    return dims | {"height": side, "width": side, "sequence": 77}
