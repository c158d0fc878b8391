"""What an image looks like while it is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


def preview_steps(steps: int, count: int) -> frozenset[int]:
    """After which steps, counted from 0, so many previews are spread evenly over the drawing; never after the last.

    >>> sorted(preview_steps(20, 3))
    [4, 9, 14]
    """
    places = (steps * (place + 1) // (count + 1) - 1 for place in range(count))
    return frozenset(place for place in places if 0 <= place < steps - 1)


def can_preview(pipe: Any) -> bool:
    """Whether the autoencoder may decode in the latents' precision: SDXL's overflows in fp16."""
    import torch

    vae = getattr(pipe, "vae", None)
    overflows = hasattr(pipe, "upcast_vae") and vae is not None and vae.dtype == torch.float16
    return vae is not None and not (overflows and vae.config.force_upcast)


def preview(pipe: Any, latents: torch.Tensor, timestep: Any) -> Image:
    """The latents as they are at this step, decoded at half the width and height.

    The mean of each 2x2 latents has half the noise, and costs the autoencoder a quarter of the final image.

    Args:
        pipe: whose autoencoder decodes; called from its step callback.
        latents: [batch, channels, height, width] after the step; the first is shown.
        timestep: of the step. Schedulers that keep latents at the noise's own scale bring them back to that of the
            image.
    """
    import torch

    vae = pipe.vae
    with torch.no_grad():
        scaled = pipe.scheduler.scale_model_input(latents[:1], timestep)
        small = torch.nn.functional.avg_pool2d(scaled.float(), 2)
        mean, deviation = (getattr(vae.config, name, None) for name in ("latents_mean", "latents_std"))
        small = small / vae.config.scaling_factor
        if mean is not None and deviation is not None:
            sides = (1, len(mean), 1, 1)
            small = small * torch.tensor(deviation).view(sides).to(small) + torch.tensor(mean).view(sides).to(small)
        image = vae.decode(small.to(latents.dtype), return_dict=False)[0]
        made: Image = pipe.image_processor.postprocess(image, output_type="pil")[0]
    return made
