"""The measured work for Stable Video Diffusion: its loop from an image's encodings and noise."""

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
    "the images' embeddings, their latents and initial latents given and the latents returned: the scheduler's set-up "
    "and steps, guidance, UNet calls, and what the pipeline does to an empty image before it would encode it lie "
    "inside, image encoder and VAE outside"
)

_NOISE = 0.02  # the pipeline's own noise_aug_strength


def random_inputs(case: Case, bundle: Bundle, latent: tuple[int, int], generator: Any) -> dict[str, torch.Tensor]:
    """Return a loop's inputs with random encodings of the image: [images, 1, width], [images, channels, height, width].

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
    """Return the pipeline's own encodings of ``pictures``, without guidance's empty halves."""
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
    """Return the images that the videos start from: smooth colours, by the case's seed."""
    import torch
    from PIL import Image

    colours = torch.rand((case.images, 3, 4, 4), generator=torch.Generator().manual_seed(case.seed))
    pixels = torch.nn.functional.interpolate(colours, (case.height, case.width), mode="bilinear")
    return [Image.fromarray(each) for each in (255 * pixels).byte().permute(0, 2, 3, 1).contiguous().numpy()]


class _VaeWithoutWeights:
    """Takes the VAE's place: the pipeline reads its dtype before it would encode."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype


@contextmanager
def prepared_encodings(pipe: Any, inputs: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Make the pipeline, which takes no encodings, use prepared ones where it would encode an image."""
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
            object.__setattr__(pipe, name, value)  # not through diffusers' own, which would change the config
        yield
    finally:
        object.__setattr__(pipe, "vae", vae)
        del pipe._encode_image, pipe._encode_vae_image
