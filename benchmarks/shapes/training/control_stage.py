"""Training of the shapes model's ControlNet, which places objects where a silhouette is white; the rest is frozen."""

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

_HELD_OUT = 1_000_000_007  # a step that no training reaches; its batch gives the held-out scenes


@dataclass(frozen=True)
class ControlSettings:
    """Hyperparameters of the ControlNet's training."""

    steps: int = 700
    batch: int = 16
    rate: float = 1e-3
    warmup: int = 100
    drop_caption: float = 0.3  # more than the denoiser's, to learn shapes from the silhouette alone
    objects: float = 4.0  # weight of the velocity's error at objects
    average: float = 0.995  # decay of the weights' moving average
    seed: int = 5
    held_out: int = 64  # number of held-out scenes
    save_every: int = 100
    log_every: int = 50


@dataclass(frozen=True)
class Batch:
    """Inputs of the networks for B scenes, with the target velocity."""

    noisy: torch.Tensor  # [B, 4, 16, 16], fp32
    velocity: torch.Tensor  # [B, 4, 16, 16], fp32
    times: torch.Tensor  # [B], int64
    text: torch.Tensor  # [B, 32, 128], fp32
    silhouettes: torch.Tensor  # [B, 3, 64, 64], fp32 in [0, 1]
    weights: torch.Tensor  # [B, 1, 16, 16], fp32: weights of the error


class ControlTrainer:
    """The ControlNet with its optimiser, its averaged weights and the frozen pipeline."""

    def __init__(self, model: Path, settings: ControlSettings, device: str) -> None:
        """Create a ControlNet with the weights of the encoder of `model`'s UNet, whose outputs are zero."""
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
        """Write weights, average, optimiser and step to one checkpoint."""
        state = {"step": self.step, "optimizer": self._optimizer.state_dict()}
        checkpoint.save(path, state | {"net": self.net.state_dict(), "average": self.average.state})

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        state = checkpoint.load(path)
        self.step = int(state["step"])
        self._optimizer.load_state_dict(state["optimizer"])
        self.net.load_state_dict(state["net"])
        self.average.load(state["average"])

    def batch(self, step: int, size: int) -> Batch:
        """Return `size` random scenes with noise and timesteps, which depend only on the seed and the step."""
        import torch

        settings = self.settings
        rng = np.random.default_rng((settings.seed, step))
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
        originals = [scenes.sample_scene(rng) for _ in range(size)]
        dropped = torch.rand(size, generator=random) < settings.drop_caption
        captions = ["" if dropped[index] else scenes.caption(scene) for index, scene in enumerate(originals)]
        times = timesteps(size, random)
        clean = vae_stage.encode(self._pipe.vae, vae_stage.render_all(originals), self.device)
        clean = clean * self._pipe.vae.config.scaling_factor
        noise = torch.randn(clean.shape, generator=random)
        masks = np.stack([silhouettes.silhouette(scene) for scene in originals]).transpose(0, 3, 1, 2)
        labels = torch.from_numpy(np.stack([seeing.labels(scene) for scene in originals])).long()
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
            weights=seeing.weights(labels, settings.objects).to(self.device),
        )

    def train_step(self) -> float:
        """Train on the batch of (seed, step), and return the mean squared error of the predicted velocity."""
        import torch

        settings = self.settings
        batch = self.batch(self.step, settings.batch)
        rate = checkpoint.learning_rate(self.step, settings.steps, settings.rate, settings.warmup)
        self._optimizer.param_groups[0]["lr"] = rate
        error = self._error(batch, self.net)
        torch.autograd.backward((error * batch.weights).mean())
        torch.nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.average.update(self.step)
        self.step += 1
        return float(_mean(error))

    def held_out(self) -> dict[str, float]:
        """Return the mean squared error on held-out scenes, with the current ControlNet and without one."""
        import torch

        with torch.no_grad():
            error = float(_mean(self._error(self._held_out, self.net)))
        return {"held_out": round(error, 6), "without": round(self._without, 6)}

    def averaged(self) -> ControlNetModel:
        """Return a ControlNet with the averaged weights, in fp32 on the CPU."""
        from diffusers import ControlNetModel

        net = ControlNetModel.from_config(self.net.config)
        net.load_state_dict({name: value.cpu() for name, value in self.average.state.items()})
        return net.eval()

    def _error(self, batch: Batch, net: ControlNetModel | None) -> torch.Tensor:
        """Return squared errors [B, 4, 16, 16] of the velocity that the frozen UNet predicts with or without `net`."""
        down, middle = None, None
        if net is not None:
            down, middle = net(batch.noisy, batch.times, batch.text, batch.silhouettes, return_dict=False)
        predicted = self.unet(
            batch.noisy,
            batch.times,
            batch.text,
            down_block_additional_residuals=down,
            mid_block_additional_residual=middle,
        ).sample
        error: torch.Tensor = (predicted - batch.velocity) ** 2
        return error


def _mean(error: torch.Tensor) -> torch.Tensor:
    return error.detach().mean()


def train_control(run: Path, model: Path, settings: ControlSettings, device: str, *, resume: bool) -> ControlTrainer:
    """Train the ControlNet of the pipeline in `model`, or resume from `run`/control.pt.

    Each line of `run`/control.jsonl also has the error on held-out scenes, with the ControlNet and without.
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
                errors = trainer.held_out()
                text = f"{log.line(trainer.step, **errors)}, held-out error {errors['held_out']:.4f}"
            report(trainer.step, text)
            if trainer.step % settings.save_every == 0 or ended:
                trainer.save(path)
    return trainer
