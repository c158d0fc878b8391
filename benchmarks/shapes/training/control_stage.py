"""A ControlNet for the trained model: it learns to put objects where a silhouette is white; all else is frozen."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import scenes, silhouettes
from . import checkpoint, export, seeing, tokenizer, vae_stage
from .denoiser_stage import timesteps

if TYPE_CHECKING:
    import torch
    from diffusers import ControlNetModel

CONDITIONING = (8, 16, 32)
"""Channels of the layers that bring a silhouette to the latent's size: two strides, as the autoencoder has."""

_HELD_OUT = 1_000_000_007  # the step whose batch no training reaches: what every line of the log is measured on


@dataclass(frozen=True)
class ControlSettings:
    """How the ControlNet is trained."""

    steps: int = 700
    batch: int = 16
    rate: float = 1e-3
    warmup: int = 100
    drop_caption: float = 0.3  # more than the denoiser's: without a caption, the silhouette alone tells the shape
    objects: float = 4.0  # how many times the velocity's error counts at objects
    average: float = 0.995  # decay of the weights' moving average
    seed: int = 5
    held_out: int = 64  # scenes that a line of the log is measured on
    save_every: int = 100
    log_every: int = 50


@dataclass(frozen=True)
class Batch:
    """What the networks see of B scenes, and what they should answer."""

    noisy: torch.Tensor  # [B, 4, 16, 16], fp32
    velocity: torch.Tensor  # the same
    times: torch.Tensor  # [B], int64
    text: torch.Tensor  # [B, 32, 128], fp32
    silhouettes: torch.Tensor  # [B, 3, 64, 64], fp32 in [0, 1]
    weights: torch.Tensor  # [B, 1, 16, 16], fp32: how much the error counts


class ControlTrainer:
    """The ControlNet, its optimiser and its average beside the frozen pipeline, with one training step as a method."""

    def __init__(self, model: Path, settings: ControlSettings, device: str) -> None:
        """Begins with the weights of the encoder of `model`'s UNet, and with outputs of zero."""
        import torch
        from diffusers import ControlNetModel

        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        self.step = 0
        self._pipe = export.load_pipeline(model).to(device)
        self.unet = self._pipe.unet
        for part in (self.unet, self._pipe.vae, self._pipe.text_encoder):
            part.requires_grad_(False).eval()
        self.net = ControlNetModel.from_unet(self.unet, conditioning_embedding_out_channels=CONDITIONING)
        self.net = self.net.to(device).requires_grad_(True).train()
        self.average = checkpoint.Average(self.net, settings.average)
        self._optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01
        )
        self._held_out = self.batch(_HELD_OUT, settings.held_out)
        with torch.no_grad():
            self._without = float(_mean(self._error(self._held_out, None)))

    def save(self, path: Path) -> None:
        """Writes weights, average, optimiser and step to one checkpoint."""
        state = {"step": self.step, "optimizer": self._optimizer.state_dict()}
        checkpoint.save(path, state | {"net": self.net.state_dict(), "average": self.average.state})

    def load(self, path: Path) -> None:
        """Continues from a checkpoint that `save` wrote."""
        state = checkpoint.load(path)
        self.step = int(state["step"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.net.load_state_dict(state["net"])
        self.average.load(state["average"])

    def batch(self, step: int, size: int) -> Batch:
        """`size` scenes drawn afresh, with noise and timesteps; the same for the same seed and step."""
        import torch

        settings = self.settings
        rng = np.random.default_rng((settings.seed, step))
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        drawn = [scenes.sample_scene(rng) for _ in range(size)]
        dropped = torch.rand(size, generator=random) < settings.drop_caption
        captions = ["" if drop else scenes.caption(scene) for scene, drop in zip(drawn, dropped.tolist(), strict=True)]
        times = timesteps(size, random)
        clean = vae_stage.encode(self._pipe.vae, vae_stage.draw(drawn), self.device)
        clean = clean * self._pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=random)
        masks = np.stack([silhouettes.silhouette(scene) for scene in drawn]).transpose(0, 3, 1, 2)
        seen = torch.from_numpy(np.stack([seeing.labels(scene) for scene in drawn])).long()
        ids = self._pipe.tokenizer(
            captions, padding="max_length", max_length=tokenizer.MAX_LENGTH, truncation=True, return_tensors="pt"
        ).input_ids
        with torch.no_grad():
            text = self._pipe.text_encoder(ids.to(self.device))[0]
        scheduler = self._pipe.scheduler
        return Batch(
            noisy=scheduler.add_noise(clean, noise, times).to(self.device),
            velocity=scheduler.get_velocity(clean, noise, times).to(self.device),
            times=times.to(self.device),
            text=text,
            silhouettes=torch.from_numpy(masks).to(self.device).float() / 255,
            weights=seeing.weights(seen, settings.objects).to(self.device),
        )

    def train_step(self) -> float:
        """One step on a batch chosen by (seed, step). Returns the mean squared error of the predicted velocity."""
        import torch

        settings = self.settings
        given = self.batch(self.step, settings.batch)
        rate = checkpoint.learning_rate(self.step, settings.steps, settings.rate, settings.warmup)
        self._optimizer.param_groups[0]["lr"] = rate
        error = self._error(given, self.net)
        torch.autograd.backward((error * given.weights).mean())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.average.update(self.step)
        self.step += 1
        return float(_mean(error))

    def held_out(self) -> dict[str, float]:
        """The mean squared error on scenes kept apart, with the ControlNet as it is and without it."""
        import torch

        with torch.no_grad():
            error = float(_mean(self._error(self._held_out, self.net)))
        return {"held_out": round(error, 6), "without": round(self._without, 6)}

    def averaged(self) -> ControlNetModel:
        """A ControlNet with the averaged weights, in fp32 on the CPU."""
        from diffusers import ControlNetModel

        net = ControlNetModel.from_config(self.net.config)
        net.load_state_dict({name: value.cpu() for name, value in self.average.state.items()})
        return net.eval()

    def _error(self, given: Batch, net: ControlNetModel | None) -> torch.Tensor:
        """Squared errors of the velocity that the frozen UNet predicts with `net`, or alone: [B, 4, 16, 16]."""
        down, middle = None, None
        if net is not None:
            down, middle = net(given.noisy, given.times, given.text, given.silhouettes, return_dict=False)
        predicted = self.unet(
            given.noisy,
            given.times,
            given.text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        error: torch.Tensor = (predicted - given.velocity) ** 2
        return error


def _mean(error: torch.Tensor) -> torch.Tensor:
    return error.detach().mean()


def train_control(run: Path, model: Path, settings: ControlSettings, device: str, *, resume: bool) -> ControlTrainer:
    """Trains the ControlNet of the pipeline in `model`, or goes on from `run`/control.pt.

    Each line of `run`/control.jsonl has the error on scenes kept apart, too, with the ControlNet and without.
    """
    trainer = ControlTrainer(model, settings, device)
    path = run / "control.pt"
    if resume and path.exists():
        trainer.load(path)
    log = checkpoint.LossLog(run / "control.jsonl", trainer.step)
    with checkpoint.progress("ControlNet", trainer.step, settings.steps) as report:
        while trainer.step < settings.steps:
            log.add(trainer.train_step())
            text, ended = None, trainer.step == settings.steps
            if trainer.step % settings.log_every == 0 or ended:
                apart = trainer.held_out()
                text = f"{log.line(trainer.step, **apart)}, apart {apart['held_out']:.4f} of {apart['without']:.4f}"
            report(trainer.step, text)
            if trainer.step % settings.save_every == 0 or ended:
                trainer.save(path)
    return trainer
