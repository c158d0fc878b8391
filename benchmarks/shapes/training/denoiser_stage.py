"""The last training stage, which trains text encoder and UNet together on latents of the trained autoencoder."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .. import scenes
from . import architecture as networks
from . import checkpoint, reading, seeing, tokenizer, vae_stage

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class DenoiserSettings:
    """Hyperparameters of text encoder and UNet."""

    steps: int = 39000
    batch: int = 16
    rate: float = 1e-3
    warmup: int = 200
    drop_caption: float = 0.1
    early_steps: int = 4000  # steps in which three of four pictures have one large object, to learn shapes sooner
    more_pairs: float = 0.4  # after the early steps, share of a batch that has only pictures of two objects
    reading: float = 0.05  # weight of the loss of `reading`'s heads
    seeing: float = 0.05  # weight of the loss of `seeing`'s heads
    objects: float = 4.0  # weight of the velocity's error at objects
    bf16: bool = True  # UNet in bf16: 1.4 times as fast on a CPU with AVX512-BF16, slower on other CPUs
    scenes: int = 48000
    seed: int = 2
    save_every: int = 100
    log_every: int = 50


@dataclass(frozen=True)
class TrainingSet:
    """Inputs and labels of the networks for N scenes."""

    latents: torch.Tensor  # [N, 4, 16, 16], fp32, scaled to unit variance
    tokens: torch.Tensor  # [N, 32], int64
    early: torch.Tensor  # [M], int64: indices of scenes with one large object
    pairs: torch.Tensor  # [P], int64: indices of scenes with two objects
    reading: torch.Tensor  # [N, 32, 3], int64: labels of `reading`'s heads
    seeing: torch.Tensor  # [N, 2, 16, 16], uint8: labels of `seeing`'s heads
    unconditional: torch.Tensor  # [32], int64: the empty caption


def training_set(run: Path, vae: AutoencoderKL, settings: DenoiserSettings, device: str) -> TrainingSet:
    """Encode random scenes and their captions; `run`/latents.pt stores the latents for the next run."""
    import torch

    digest = hashlib.sha256(repr((settings.scenes, settings.seed, vae.config.scaling_factor)).encode())
    for value in (*vae.encoder.state_dict().values(), *vae.quant_conv.state_dict().values()):
        digest.update(value.cpu().numpy().tobytes())
    originals = vae_stage.training_scenes(settings.scenes, settings.seed)
    path = run / "latents.pt"
    if path.exists() and (stored := checkpoint.load(path))["digest"] == digest.hexdigest():
        latents = stored["latents"]
    else:
        parts = []
        with checkpoint.progress("latents", 0, len(originals)) as report:
            for first in range(0, len(originals), 1000):
                pictures = vae_stage.render_all(originals[first : first + 1000])
                parts.append(vae_stage.encode(vae, pictures, device))
                report(first + len(parts[-1]))
        latents = torch.cat(parts) * vae.config.scaling_factor
        checkpoint.save(path, {"digest": digest.hexdigest(), "latents": latents})
    early = [i for i, scene in enumerate(originals) if [item.size for item in scene.items] == ["large"]]
    return TrainingSet(
        latents=latents,
        tokens=tokenize(run, [scenes.caption(scene) for scene in originals]),
        early=torch.tensor(early, dtype=torch.long),
        pairs=torch.tensor([i for i, scene in enumerate(originals) if scene.relation], dtype=torch.long),
        reading=torch.tensor([reading.labels(scene) for scene in originals]),
        seeing=torch.from_numpy(np.stack([seeing.labels(scene) for scene in originals])),
        unconditional=tokenize(run, [""])[0],
    )


def tokenize(run: Path, captions: list[str]) -> torch.Tensor:
    """Write the tokenizer to `run`/tokenizer, and return the captions' token ids, int64 [N, 32]."""
    import torch

    directory = run / "tokenizer"
    tokenizer.write_tokenizer(directory)
    encoder = tokenizer.load_tokenizer(directory)
    unique = {text: index for index, text in enumerate(dict.fromkeys(captions))}
    ids = encoder(list(unique), padding="max_length", max_length=tokenizer.MAX_LENGTH, truncation=True).input_ids
    return torch.tensor(ids)[[unique[text] for text in captions]]


def timesteps(batch: int, random: torch.Generator, count: int = 1000) -> torch.Tensor:
    """Return random timesteps, one from each of `batch` equally probable ranges, in random order: int64 [B].

    Noisy steps, which decide shapes and places, are more frequent: the density grows as t^0.43.
    """
    import torch

    spread = ((torch.arange(batch) + torch.rand(batch, generator=random)) / batch) ** 0.7
    return (spread * count).long().clamp(max=count - 1)[torch.randperm(batch, generator=random)]


class Denoiser:
    """Text encoder and UNet with their optimiser and their averaged weights."""

    def __init__(self, settings: DenoiserSettings, device: str) -> None:
        import torch
        from diffusers.models.attention_processor import AttnProcessor

        torch.manual_seed(settings.seed)
        self.settings = settings
        self.device = device
        self.step = 0
        self.text_encoder = networks.new_text_encoder().to(device).train()
        self.unet = networks.new_unet().to(device).train()
        if settings.bf16 and device == "cpu":
            # On the CPU, PyTorch's fused attention in bf16 is slower than its separate operations.
            self.unet.set_attn_processor(AttnProcessor())
        self.reading_heads = reading.new_heads().to(device).train()
        self.seeing_heads = seeing.new_heads().to(device).train()
        self.scheduler = networks.new_scheduler()
        self.modules = {
            "text_encoder": self.text_encoder,
            "unet": self.unet,
            "reader": self.reading_heads,
            "seer": self.seeing_heads,
        }
        self.averages = {name: checkpoint.Average(self.modules[name]) for name in ("text_encoder", "unet")}
        self._parameters = [p for module in self.modules.values() for p in module.parameters()]
        fused = device == "cpu" or device.startswith("cuda")
        self._optimizer = torch.optim.AdamW(
            self._parameters, lr=settings.rate, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )

    def save(self, path: Path) -> None:
        """Write weights, averages, optimiser and step to one checkpoint."""
        state: dict[str, object] = {"step": self.step, "optimizer": self._optimizer.state_dict()}
        for name, module in self.modules.items():
            state[name] = module.state_dict()
        for name, average in self.averages.items():
            state[f"{name}_average"] = average.state
        checkpoint.save(path, state)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint that `save` wrote."""
        state = checkpoint.load(path)
        self.step = int(state["step"])
        self._optimizer.load_state_dict(state["optimizer"])
        for name, module in self.modules.items():
            module.load_state_dict(state[name])
        for name, average in self.averages.items():
            average.load(state[f"{name}_average"])

    def train_step(self, data: TrainingSet) -> float:
        """Train on the batch of (seed, step), and return the mean squared error of the predicted velocity."""
        import torch

        settings, device = self.settings, self.device
        random = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        chosen = torch.randint(len(data.latents), (settings.batch,), generator=random)
        if self.step < settings.early_steps and len(data.early):
            large = data.early[torch.randint(len(data.early), (settings.batch,), generator=random)]
            chosen = torch.where(torch.rand(settings.batch, generator=random) < 0.75, large, chosen)
        elif len(data.pairs):
            pairs = data.pairs[torch.randint(len(data.pairs), (settings.batch,), generator=random)]
            chosen = torch.where(torch.rand(settings.batch, generator=random) < settings.more_pairs, pairs, chosen)
        dropped = torch.rand(settings.batch, generator=random) < settings.drop_caption
        times = timesteps(settings.batch, random).to(device)
        noise = torch.randn(settings.batch, *data.latents.shape[1:], generator=random).to(device)
        clean = data.latents[chosen].to(device)
        ids = torch.where(dropped[:, None], data.unconditional, data.tokens[chosen]).to(device)
        reading_labels = torch.where(dropped[:, None, None], reading.IGNORED, data.reading[chosen]).to(device)
        seeing_labels = data.seeing[chosen].to(device, torch.long)

        rate = checkpoint.learning_rate(self.step, settings.steps, settings.rate, settings.warmup)
        self._optimizer.param_groups[0]["lr"] = rate
        text = self.text_encoder(ids)[0]  # [B, 32, 128]
        noisy = self.scheduler.add_noise(clean, noise, times)
        velocity = self.scheduler.get_velocity(clean, noise, times)
        autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=settings.bf16)
        with autocast, seeing.recorded_features(self.unet) as features:
            predicted = self.unet(noisy, times, text).sample
        error = (predicted.float() - velocity) ** 2
        loss = error.mean()
        total = (error * seeing.weights(seeing_labels, settings.objects)).mean()
        total = total + settings.seeing * seeing.loss(self.seeing_heads, features, seeing_labels)
        if not bool(dropped.all()):
            total = total + settings.reading * reading.loss(self.reading_heads, text, reading_labels)
        torch.autograd.backward(total)
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()
        for average in self.averages.values():
            average.update(self.step)
        self.step += 1
        return float(loss)


def train_denoiser(
    run: Path,
    vae: AutoencoderKL,
    settings: DenoiserSettings,
    device: str,
    *,
    resume: bool,
    export_every: int = 0,
    export: Callable[[], None] = lambda: None,
) -> Denoiser:
    """Train text encoder and UNet, or resume from `run`/denoiser.pt.

    Args:
        export: called every `export_every` steps, right after a checkpoint; never if `export_every` is 0.
    """
    denoiser = Denoiser(settings, device)
    data = training_set(run, vae, settings, device)
    path = run / "denoiser.pt"
    if resume and path.exists():
        denoiser.load(path)
    log = checkpoint.LossLog(run / "denoiser.jsonl", denoiser.step)
    with checkpoint.progress("denoiser", denoiser.step, settings.steps) as report:
        for _ in _until(denoiser, settings.steps):
            log.add(denoiser.train_step(data))
            text = None
            if denoiser.step % settings.log_every == 0 or denoiser.step == settings.steps:
                text = log.line(denoiser.step, batch=settings.batch)
            report(denoiser.step, text)
            due = export_every > 0 and denoiser.step % export_every == 0
            if due or denoiser.step % settings.save_every == 0 or denoiser.step == settings.steps:
                denoiser.save(path)
            if due and denoiser.step < settings.steps:
                export()
                log.resume()
    return denoiser


def _until(denoiser: Denoiser, steps: int) -> Iterator[None]:
    while denoiser.step < steps:
        yield
