"""The denoising loop that every contestant runs: DDIM with classifier-free guidance, without a host synchronisation."""

from __future__ import annotations

import math
from typing import Any

import torch

from .peers import Denoiser

GUIDANCE = 5.0


class Loop:
    """A denoising loop from fixed noise.

    Args:
        noise: [images, channels, height, width]; its dtype and device are those of the whole loop. A UNet call has a
            batch of twice as many.
        steps: of the scheduler.
    """

    def __init__(self, noise: torch.Tensor, steps: int) -> None:
        from diffusers import DDIMScheduler

        self._scheduler: Any = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        )
        self._scheduler.set_timesteps(steps)
        # The scheduler reads numbers and the UNet a device tensor, so nothing is read back.
        self._numbers = [int(timestep) for timestep in self._scheduler.timesteps]
        self._timesteps = self._scheduler.timesteps.to(noise.device)
        self._noise = noise

    @property
    def timesteps(self) -> torch.Tensor:
        """[steps], on the device."""
        assert isinstance(self._timesteps, torch.Tensor)
        return self._timesteps

    @torch.no_grad()
    def run(self, denoiser: Denoiser) -> torch.Tensor:
        """The final latents [images, channels, height, width]. The denoiser's generation has to be entered already."""
        latents = self._noise
        for number, timestep in zip(self._numbers, self._timesteps.unbind(), strict=True):
            noise_pred = denoiser.predict(torch.cat([latents, latents]), timestep)
            unconditional, conditional = noise_pred.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = self._scheduler.step(guided, number, latents, return_dict=False)[0]
        return latents

    def generate(self, denoiser: Denoiser) -> torch.Tensor:
        """One generation from the beginning; the final latents."""
        with denoiser.generation(self._timesteps):
            return self.run(denoiser)


def decibels(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """PSNR relative to the reference's range; infinite where they are equal, minus infinity where one is not finite."""
    ours, theirs = latents.double(), reference.double()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return -math.inf
    error = float((ours - theirs).square().mean().sqrt())
    span = float(theirs.max() - theirs.min())
    return math.inf if error == 0 else 20 * math.log10(span / error)
