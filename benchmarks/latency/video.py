"""The measured work for Stable Video Diffusion: its loop from the image's embedding, the image's latent and noise."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from ...engines.bundle.bundle import Bundle
from .case import Case

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

GIVEN = (
    "the images' embeddings, their latents and initial latents given and the latents returned: the scheduler's set-up "
    "and steps, guidance, UNet calls, and what the pipeline does to an empty image before it would encode it lie "
    "inside, image encoder and VAE outside"
)

_NOISE = 0.02  # the pipeline's own noise_aug_strength


class _Enough(Exception):
    """As many steps were made as were asked for; this pipeline has no other way to end early."""

    def __init__(self, latents: Any) -> None:
        super().__init__()
        self.latents = latents


def random_inputs(case: Case, bundle: Bundle, latent: tuple[int, int], generator: Any) -> dict[str, torch.Tensor]:
    """What a loop begins with, the image's encodings random: [images, 1, width] and [images, channels, height, width].

    Args:
        latent: its height and width.
    """
    import torch

    config = bundle.unet_config
    channels, width = config["out_channels"], config["cross_attention_dim"]
    return {
        "latents": torch.randn((case.images, case.frames or 0, channels, *latent), generator=generator),
        "image_embeddings": torch.randn((case.images, 1, width), generator=generator),
        "image_latents": torch.randn((case.images, channels, *latent), generator=generator),
    }


def encode(pipe: Any, case: Case, generator: Any) -> dict[str, torch.Tensor]:
    """The encodings that the pipeline itself makes of ``pictures``, without guidance's empty halves."""
    import torch

    images = pictures(case)
    with torch.no_grad():
        pixels = pipe.video_processor.preprocess(images, height=case.height, width=case.width)
        pixels = pixels + _NOISE * torch.randn(pixels.shape, generator=generator)
        return {
            "image_embeddings": pipe._encode_image(images, "cpu", 1, False),
            "image_latents": pipe._encode_vae_image(pixels, "cpu", 1, False),
        }


@cache
def pictures(case: Case) -> list[Image]:
    """What the videos start from: smooth colours, by the case's seed."""
    import torch
    from PIL import Image

    colours = torch.rand((case.images, 3, 4, 4), generator=torch.Generator().manual_seed(case.seed))
    pixels = torch.nn.functional.interpolate(colours, (case.height, case.width), mode="bilinear")
    return [Image.fromarray(each) for each in (255 * pixels).byte().permute(0, 2, 3, 1).contiguous().numpy()]


def denoise(pipe: Any, case: Case, inputs: Mapping[str, torch.Tensor], calls: int | None) -> Any:
    """One loop; the final latents [images, frames, channels, height, width].

    Args:
        calls: stop after so many steps; None for the whole loop.
    """
    import torch

    empty = torch.zeros((case.images, 3, case.height, case.width), device=case.device)
    with _encoded(pipe, inputs):
        try:
            return _call(pipe, case, calls, image=empty, latents=inputs["latents"], output_type="latent")
        except _Enough as enough:
            return enough.latents


def draw(pipe: Any, case: Case, calls: int | None) -> Any:
    """One whole pipeline call, from images to videos; ``calls`` as in ``denoise``."""
    import torch

    generator = torch.Generator("cpu").manual_seed(case.seed)
    try:
        return _call(pipe, case, calls, image=pictures(case), generator=generator)
    except _Enough as enough:
        with torch.no_grad():
            return pipe.decode_latents(enough.latents, case.frames)


def _call(pipe: Any, case: Case, calls: int | None, **given: Any) -> Any:
    def step_ended(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if calls is not None and step + 1 >= calls:
            raise _Enough(tensors["latents"])
        return tensors

    return pipe(
        **given,
        num_frames=case.frames,
        num_inference_steps=case.steps,
        min_guidance_scale=1.0,
        max_guidance_scale=case.guidance,
        height=case.height,
        width=case.width,
        **({} if calls is None else {"callback_on_step_end": step_ended}),
    ).frames


class _Resting:
    """Stands where the VAE was: the pipeline asks for its dtype before it would encode."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@contextmanager
def _encoded(pipe: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let the pipeline, which takes no encodings, hand these out where it would encode an image."""
    import torch

    def handing_out(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
        def encode(
            image: Any, device: Any, num_videos_per_prompt: int, do_classifier_free_guidance: bool
        ) -> torch.Tensor:
            # As diffusers has it: without the image both of its encodings are zero.
            return torch.cat([torch.zeros_like(tensor), tensor]) if do_classifier_free_guidance else tensor

        return encode

    vae = pipe.vae
    given = {
        "vae": _Resting(torch.float32),
        "_encode_image": handing_out(inputs["image_embeddings"]),
        "_encode_vae_image": handing_out(inputs["image_latents"]),
    }
    try:
        for name, value in given.items():
            object.__setattr__(pipe, name, value)  # not into the pipeline's config, as diffusers would
        yield
    finally:
        object.__setattr__(pipe, "vae", vae)
        del pipe._encode_image, pipe._encode_vae_image
