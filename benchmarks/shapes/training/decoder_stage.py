"""The second training stage, which trains only the decoder, for sharper edges; the latents do not change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from .. import scenes
from . import checkpoint, vae_stage


@dataclass(frozen=True)
class DecoderSettings:
    """Hyperparameters of the decoder's further training."""

    steps: int = 2000
    batch: int = 8
    rate: float = 1e-3
    warmup: int = 50
    edge_weight: float = 0.25
    noise: float = 0.03  # added to the scaled latents (unit variance), because generated latents are not exact either
    pictures: int = 6000
    seed: int = 3
    save_every: int = 200


def train_decoder(run: Path, settings: DecoderSettings, device: str, *, resume: bool) -> None:
    """Train the decoder of `run`/vae.pt on the latents of a frozen encoder, or resume from `run`/decoder.pt.

    `vae_stage.load_vae` uses the result once this stage is complete.

    Raises:
        UserError: the autoencoder's stage is not complete.
    """
    import torch

    vae = vae_stage.load_vae(run).to(device)
    trained = torch.nn.ModuleDict({"decoder": vae.decoder, "post_quant_conv": vae.post_quant_conv})
    optimizer = torch.optim.AdamW(trained.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=1e-4)
    path, start = run / "decoder.pt", 0
    if resume and path.exists():
        state = checkpoint.load(path)
        trained.load_state_dict(state["weights"])
        optimizer.load_state_dict(state["optimizer"])
        start = int(state["step"])
    if start >= settings.steps:
        return
    pictures = vae_stage.render_all(vae_stage.training_scenes(settings.pictures, settings.seed))
    latents = vae_stage.encode(vae, pictures, device)
    noise_scale = settings.noise / vae.config.scaling_factor
    log = checkpoint.LossLog(run / "decoder.jsonl", start)
    with checkpoint.progress("decoder", start, settings.steps) as report:
        for step in range(start, settings.steps):
            random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
            chosen = torch.randint(len(pictures), (settings.batch,), generator=random)
            target = scenes.to_signal(pictures[chosen.numpy()]).to(device)
            noise = torch.randn(settings.batch, *latents.shape[1:], generator=random)
            rate = checkpoint.learning_rate(step, settings.steps, settings.rate, settings.warmup)
            optimizer.param_groups[0]["lr"] = rate
            decoded = vae.decode((latents[chosen] + noise_scale * noise).to(device)).sample
            loss = vae_stage.reconstruction_loss(decoded, target, settings.edge_weight)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            log.add(loss.item())
            done, text = step + 1, None
            if done % 25 == 0 or done == settings.steps:
                text = log.line(done)
            report(done, text)
            if done % settings.save_every == 0 or done == settings.steps:
                state = {"step": done, "finished": done == settings.steps, "optimizer": optimizer.state_dict()}
                checkpoint.save(path, {**state, "weights": trained.state_dict()})
