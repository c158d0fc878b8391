"""The measured work for Stable Video Diffusion: its loop from prepared encodings and noise."""

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

VIDEO_LOOP = (
    "given embeddings and latents of the images and initial latents; the time contains the scheduler's set-up and "
    "steps, guidance, UNet calls and the preprocessing of an empty image, but not image encoder and VAE"
)

_NOISE = 0.02  # the pipeline's default of noise_aug_strength


def random_inputs(case: Case, bundle: Bundle, latent: tuple[int, int], generator: Any) -> dict[str, torch.Tensor]:
    """Return the inputs of a loop, with random encodings [videos, 1, width] and [videos, channels, height, width].

    Args:
        latent: height and width of the latent.
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
    """Return the pipeline's encodings of ``pictures``, without the zeros for guidance."""
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
    """Return the images that the videos start from: smooth random colours from the case's seed."""
    import torch
    from PIL import Image

    colours = torch.rand((case.images, 3, 4, 4), generator=torch.Generator().manual_seed(case.seed))
    pixels = torch.nn.functional.interpolate(colours, (case.height, case.width), mode="bilinear")
    return [Image.fromarray(image) for image in (255 * pixels).byte().permute(0, 2, 3, 1).contiguous().numpy()]


class _VaeWithoutWeights:
    """A stub of the VAE, whose dtype the pipeline reads."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@contextmanager
def prepared_encodings(pipe: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make the pipeline use prepared encodings instead of encoding an image; it has no argument for them."""
    import torch

    def prepared(tensor: torch.Tensor) -> Callable[..., torch.Tensor]:
        def encode(
            image: Any, device: Any, num_videos_per_prompt: int, do_classifier_free_guidance: bool
        ) -> torch.Tensor:
            # As in diffusers, the unconditional encodings are zero.
            return torch.cat([torch.zeros_like(tensor), tensor]) if do_classifier_free_guidance else tensor

        return encode

    vae = pipe.vae
    replacements = {
        "vae": _VaeWithoutWeights(torch.float32),
        "_encode_image": prepared(inputs["image_embeddings"]),
        "_encode_vae_image": prepared(inputs["image_latents"]),
    }
    try:
        for name, value in replacements.items():
            object.__setattr__(pipe, name, value)  # diffusers' own __setattr__ would change the config
        yield
    finally:
        object.__setattr__(pipe, "vae", vae)
        del pipe._encode_image, pipe._encode_vae_image
