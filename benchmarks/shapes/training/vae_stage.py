"""The first training stage, which trains the autoencoder, and the pictures and latents that all stages learn from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ....errors import UserError
from .. import scenes
from . import architecture as networks
from . import checkpoint

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class VaeSettings:
    """Hyperparameters of the autoencoder's training."""

    steps: int = 1500
    batch: int = 8
    rate: float = 1e-3
    warmup: int = 50
    kl_weight: float = 1e-4
    edge_weight: float = 0.25
    pictures: int = 6000
    calibration: int = 512  # number of pictures from which the scaling factor is computed
    seed: int = 1
    save_every: int = 200


def training_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """Return `count` random scenes without held-out pairs; equal seeds give equal scenes."""
    rng = np.random.default_rng(seed)
    return [scenes.sample_scene(rng) for _ in range(count)]


def render_all(originals: list[scenes.Scene]) -> npt.NDArray[np.uint8]:
    """Render the scenes: uint8 (N, 3, 64, 64)."""
    return np.stack([scenes.render(scene) for scene in originals]).transpose(0, 3, 1, 2)


def reconstruction_loss(decoded: torch.Tensor, target: torch.Tensor, edge_weight: float) -> torch.Tensor:
    """Return the mean absolute and squared error of the pictures, plus that of their differences between pixels.

    Pixels of objects, which differ from the corner pixel, count five times, because most pixels are background.
    """
    objects = (target - target[:, :, :1, :1]).abs().amax(dim=1, keepdim=True) > 0.05
    error = (decoded - target) * (1 + 4 * objects)
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    return error.abs().mean() + ((decoded - target) * error).mean() + edge_weight * edges


def train_vae(run: Path, settings: VaeSettings, device: str, *, resume: bool) -> AutoencoderKL:
    """Train the autoencoder, or resume from `run`/vae.pt; set its scaling factor to 1/std of the latents.

    The batch and noise of a step depend only on (seed, step), so a resumed run ends with the weights of an
    uninterrupted one.
    """
    import torch

    torch.manual_seed(settings.seed)
    vae = networks.new_vae().to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    path, start, scaled = run / "vae.pt", 0, False
    if resume and path.exists():
        state = checkpoint.load(path)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        start, scaled = int(state["step"]), bool(state.get("scaling_factor"))
    if not start:
        (run / "decoder.pt").unlink(missing_ok=True)  # the decoder of an earlier autoencoder
    if start < settings.steps or not scaled:
        pictures = render_all(training_scenes(settings.pictures, settings.seed))
        log = checkpoint.LossLog(run / "vae.jsonl", start)
        with checkpoint.progress("autoencoder", start, settings.steps) as report:
            for step in range(start, settings.steps):
                random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
                chosen = torch.randint(len(pictures), (settings.batch,), generator=random)
                target = scenes.to_signal(pictures[chosen.numpy()]).to(device)
                rate = checkpoint.learning_rate(step, settings.steps, settings.rate, settings.warmup)
                optimizer.param_groups[0]["lr"] = rate
                posterior = vae.encode(target).latent_dist
                noise = torch.randn(posterior.mean.shape, generator=random).to(device)
                decoded = vae.decode(posterior.mean + posterior.std * noise).sample
                loss = reconstruction_loss(decoded, target, settings.edge_weight)
                (loss + settings.kl_weight * posterior.kl().mean() / posterior.mean[0].numel()).backward()
                torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
                log.add(loss.item())
                done = step + 1
                text = None
                if done % 25 == 0 or done == settings.steps:
                    text = log.line(done)
                report(done, text)
                if done % settings.save_every == 0 or done == settings.steps:
                    checkpoint.save(path, _state(done, vae, optimizer))
        calibration = encode(vae, render_all(training_scenes(settings.calibration, settings.seed + 1)), device)
        scale = round(1 / calibration.std().item(), 5)
        checkpoint.save(path, {**_state(settings.steps, vae, optimizer), "scaling_factor": scale})
    return load_vae(run).to(device)


def _state(step: int, vae: AutoencoderKL, optimizer: torch.optim.Optimizer) -> dict[str, object]:
    return {"step": step, "vae": vae.state_dict(), "optimizer": optimizer.state_dict(), "scaling_factor": 0.0}


def load_vae(run: Path) -> AutoencoderKL:
    """Return the trained autoencoder of `run`, in fp32 on the CPU, with the decoder of the second stage once complete.

    Raises:
        UserError: the training of the autoencoder is not complete.
    """
    state = checkpoint.load(run / "vae.pt")
    if not state.get("scaling_factor"):
        raise UserError(
            f"the autoencoder in {run} is not fully trained: run `python -m offcut.benchmarks.shapes.training.train`"
        )
    vae = networks.new_vae().eval()
    vae.load_state_dict(state["vae"])
    if (run / "decoder.pt").exists():
        decoder = checkpoint.load(run / "decoder.pt")
        if decoder["finished"]:
            vae.load_state_dict(decoder["weights"], strict=False)  # the checkpoint has no encoder
    vae.register_to_config(scaling_factor=state["scaling_factor"])
    return vae


def encode(vae: AutoencoderKL, pictures: npt.NDArray[np.uint8], device: str, batch: int = 64) -> torch.Tensor:
    """Return the posterior means of pictures uint8 (N, 3, 64, 64), not scaled: fp32 [N, 4, 16, 16] on the CPU."""
    import torch

    parts = []
    with torch.inference_mode():
        for first in range(0, len(pictures), batch):
            signal = scenes.to_signal(pictures[first : first + batch]).to(device)
            parts.append(vae.encode(signal).latent_dist.mean.cpu())
    return torch.cat(parts).clone()
