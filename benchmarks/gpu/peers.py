"""The denoising loop of the GPU checks, and the models that run it: offcut, eager PyTorch, DeepCache, torch.compile.

All of them run the same DDIM loop with classifier-free guidance, without a host synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from ...runtime.generation.schedule import Schedule
from ..turns import Clock, LoopRunner, Marks

if TYPE_CHECKING:
    from ...runtime.unet import UNet

GUIDANCE = 5.0
Conditioning = Mapping[str, Any]
"""Inputs of a UNet's ``forward`` by name, without sample and timestep."""
Predict = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Function that returns the noise in a sample [batch, channels, height, width] at a timestep []."""


class DenoisingLoop:
    """A denoising loop from fixed noise.

    Args:
        noise: [images, channels, height, width]; the loop runs in its dtype and on its device. A UNet call has two rows
            for each image.
        steps: number of scheduler steps.
    """

    def __init__(self, noise: torch.Tensor, steps: int) -> None:
        from diffusers import DDIMScheduler

        self._scheduler: Any = DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False, steps_offset=1
        )
        self._scheduler.set_timesteps(steps)
        # The scheduler gets numbers and the UNet a device tensor, so that the host reads nothing from the device.
        self._numbers = [int(timestep) for timestep in self._scheduler.timesteps]
        self.timesteps: torch.Tensor = self._scheduler.timesteps.to(noise.device)
        """Timesteps [steps], on the device."""
        self.noise = noise

    @torch.no_grad()
    def run(self, predict: Predict) -> torch.Tensor:
        """Return the final latents [images, channels, height, width]."""
        latents = self.noise
        for number, timestep in zip(self._numbers, self.timesteps.unbind(), strict=True):
            noise_pred = predict(torch.cat([latents, latents]), timestep)
            unconditional, conditional = noise_pred.chunk(2)
            guided = unconditional + GUIDANCE * (conditional - unconditional)
            latents = self._scheduler.step(guided, number, latents, return_dict=False)[0]
        return latents


def decibels(latents: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the PSNR in dB relative to the range of the reference; infinite where both are equal.

    The result is minus infinity where a value is not finite.
    """
    ours, theirs = latents.double(), reference.double()
    if not bool(torch.isfinite(ours).all() and torch.isfinite(theirs).all()):
        return -math.inf
    error = float((ours - theirs).square().mean().sqrt())
    span = float(theirs.max() - theirs.min())
    return math.inf if error == 0 else 20 * math.log10(span / error)


class LoopDenoiser(LoopRunner):
    """A model that predicts noise in a ``DenoisingLoop``.

    Args:
        trajectory: the denoising loop.
        model: model that is called like diffusers' UNet.
        conditioning: conditioning of every UNet call.
        marks: marks around the UNet's calls; without calls by default.
    """

    def __init__(
        self, trajectory: DenoisingLoop, model: Any, conditioning: Conditioning, marks: Marks | None = None
    ) -> None:
        self.trajectory, self.model, self.conditioning = trajectory, model, conditioning
        self.marks = marks or Marks(Clock(str(trajectory.noise.device)))

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Return the noise in a sample [batch, channels, height, width] at a timestep [], as a new tensor."""
        noise_pred = self.model(sample, timestep, return_dict=False, **self.conditioning)[0]
        assert isinstance(noise_pred, torch.Tensor)
        return noise_pred

    def loop(self) -> torch.Tensor:
        return self.trajectory.run(self.predict)

    def generate(self) -> torch.Tensor:
        """Run one turn and return the final latents."""
        with self.turn():
            return self.loop()


class EngineDenoiser(LoopDenoiser):
    """A pair of engines in offcut's UNet.

    Args:
        schedule: schedule of the cached loop; None makes every call full.
        cut: cut of the shallow calls.
    """

    def __init__(
        self,
        trajectory: DenoisingLoop,
        unet: UNet,
        conditioning: Conditioning,
        schedule: Schedule | None,
        cut: str | None,
        marks: Marks | None = None,
    ) -> None:
        super().__init__(trajectory, unet, conditioning, marks)
        self._schedule, self._cut = schedule, cut if schedule is not None else None

    def turn(self) -> AbstractContextManager[object]:
        self.model.set_schedule(self._schedule, cut=self._cut)
        generation: AbstractContextManager[object] = self.model.generation(calls=len(self.trajectory.timesteps))
        return generation


class HelperDenoiser(LoopDenoiser):
    """An eager UNet with DeepCache's own helper (PyPI ``DeepCache``) and its branch 0."""

    def __init__(self, trajectory: DenoisingLoop, unet: Any, conditioning: Conditioning, interval: int) -> None:
        from DeepCache import DeepCacheSDHelper

        super().__init__(trajectory, unet, conditioning)
        scheduler = SimpleNamespace(timesteps=trajectory.timesteps)
        self._helper = DeepCacheSDHelper(pipe=SimpleNamespace(unet=unet, scheduler=scheduler))
        self._helper.set_params(cache_interval=interval, cache_branch_id=0)

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._helper.enable()
        try:
            yield
        finally:
            self._helper.disable()


class CachedUNet:
    """A UNet with a hand-written cache like DeepCache's branch 0: a function each for full and shallow calls.

    The class shares no code with the graph surgery.

    Args:
        unet: diffusers' ``UNet2DConditionModel``, without ControlNet or IP-Adapter.
    """

    def __init__(self, unet: Any) -> None:
        self.unet = unet

    def full(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the noise prediction, and the hidden state that enters the outermost decoder layer.

        Args:
            sample: [batch, channels, height, width].
            timestep: [] or [batch].
        """
        text = conditioning["encoder_hidden_states"]
        embedding = self._embed(sample, timestep, conditioning)
        hidden = self.unet.conv_in(sample)
        skips = [hidden]
        for block in self.unet.down_blocks:
            hidden, outputs = block(hidden_states=hidden, temb=embedding, **_text(block, text))
            skips += outputs
        hidden = self.unet.mid_block(hidden, embedding, **_text(self.unet.mid_block, text))
        *inner, last = self.unet.up_blocks
        for block in inner:
            count = len(block.resnets)
            skip_connections = {"res_hidden_states_tuple": tuple(skips[-count:])}
            hidden = block(hidden_states=hidden, temb=embedding, **skip_connections, **_text(block, text))
            del skips[-count:]
        for layer in range(len(last.resnets) - 1):
            hidden = self._layer(last, layer, hidden, skips.pop(), embedding, text)
        return self._outermost(hidden, skips.pop(), embedding, text), hidden

    def shallow(
        self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning, feature: torch.Tensor
    ) -> torch.Tensor:
        """Return the noise prediction from the cached feature, the first convolution and the last decoder layer."""
        embedding = self._embed(sample, timestep, conditioning)
        skip = self.unet.conv_in(sample)
        return self._outermost(feature, skip, embedding, conditioning["encoder_hidden_states"])

    def shallow_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Yield the weights that ``shallow`` reads."""
        last = self.unet.up_blocks[-1]
        modules = [self.unet.conv_in, self.unet.time_embedding, self.unet.conv_norm_out, self.unet.conv_out]
        modules += [last.resnets[-1], *list(getattr(last, "attentions", []))[-1:]]
        if (added := getattr(self.unet, "add_embedding", None)) is not None:
            modules.append(added)
        for module in modules:
            yield from module.parameters()

    def _embed(self, sample: torch.Tensor, timestep: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        unet = self.unet
        embedding: torch.Tensor = unet.time_embedding(unet.get_time_embed(sample=sample, timestep=timestep))
        added = unet.get_aug_embed(
            emb=embedding,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs=conditioning.get("added_cond_kwargs"),
        )
        return embedding if added is None else embedding + added

    def _layer(self, block: Any, layer: int, hidden: Any, skip: Any, embedding: Any, text: Any) -> torch.Tensor:
        hidden = block.resnets[layer](torch.cat([hidden, skip], dim=1), embedding)
        if getattr(block, "has_cross_attention", False):
            hidden = block.attentions[layer](hidden, encoder_hidden_states=text, return_dict=False)[0]
        assert isinstance(hidden, torch.Tensor)
        return hidden

    def _outermost(self, hidden: Any, skip: Any, embedding: Any, text: Any) -> torch.Tensor:
        unet, last = self.unet, self.unet.up_blocks[-1]
        hidden = self._layer(last, len(last.resnets) - 1, hidden, skip, embedding, text)
        noise_pred = unet.conv_out(unet.conv_act(unet.conv_norm_out(hidden)))
        assert isinstance(noise_pred, torch.Tensor)
        return noise_pred


def _text(block: Any, text: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}


class CachedDenoiser(LoopDenoiser):
    """A ``CachedUNet`` that follows a schedule, in eager mode or compiled.

    Args:
        schedule: schedule of the loop; None makes every call full.
        compile: function that compiles the full and the shallow function; None leaves both eager.
    """

    def __init__(
        self,
        trajectory: DenoisingLoop,
        unet: CachedUNet,
        conditioning: Conditioning,
        schedule: Schedule | None,
        compile: Callable[[Any], Any] | None = None,
    ) -> None:
        super().__init__(trajectory, unet, conditioning)
        self._full: Any = compile(unet.full) if compile else unet.full
        self._shallow: Any = compile(unet.shallow) if compile else unet.shallow
        self._replays = compile is not None
        self._schedule = schedule
        self._call = 0
        self._feature: torch.Tensor | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        self._call, self._feature = 0, None
        yield

    def predict(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        full = self._schedule is None or self._schedule.is_full(self._call, len(self.trajectory.timesteps))
        self._call += 1
        if self._replays:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        if full:
            noise_pred, self._feature = self._full(sample, timestep, self.conditioning)
        else:
            noise_pred = self._shallow(sample, timestep, self.conditioning, self._feature)
        assert isinstance(noise_pred, torch.Tensor)
        assert self._feature is not None
        if self._replays:  # the next replay overwrites these outputs
            noise_pred = noise_pred.clone()
            self._feature = self._feature.clone() if full else self._feature
        return noise_pred


def max_autotune(function: Any) -> Any:
    """Compile the full or the shallow function of a ``CachedUNet`` with ``mode="max-autotune"`` for one shape."""
    return torch.compile(function, mode="max-autotune", fullgraph=True, dynamic=False)
