"""Training of the judge network; a run can be resumed, and equal settings give equal weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .. import model, scenes
from ..judge_net.network import JudgeNetwork, Maps
from . import checkpoint, vae_stage
from . import judge_data as data


@dataclass(frozen=True)
class JudgeSettings:
    """Hyperparameters of the judge network's training."""

    steps: int = 1200
    batch: int = 32
    rate: float = 2e-3
    warmup: int = 50
    pictures: int = 12_000
    softened: int = 4_000  # number of pictures that are also softened by the autoencoder
    latent_noise: float = 0.15  # maximum noise in the latents of softened pictures, in their standard deviations
    centre_weight: float = 20.0
    seed: int = 11
    save_every: int = 200


def loss_of(maps: Maps, labels: data.Labels, centre_weight: float) -> torch.Tensor:
    """Return the sum of cross-entropies: of the centres' heat, colour and shape near centres, and the background."""
    heat, colour, shape = data.targets(labels)
    weight = 1 + centre_weight * heat
    centre = (weight * functional.binary_cross_entropy_with_logits(maps.centre, heat, reduction="none")).mean()
    near = heat * (heat > 0.3)
    words = functional.cross_entropy(maps.colour, colour, reduction="none")
    words = words + functional.cross_entropy(maps.shape, shape, reduction="none")
    return centre + (near * words).sum() / near.sum() + functional.cross_entropy(maps.background, labels.background)


def train_judge(run: Path, settings: JudgeSettings, *, vae: Path | None = None, resume: bool = True) -> JudgeNetwork:
    """Train the network, or resume from `run`/judge.pt; return it in evaluation mode with its averaged weights.

    The batch and the disturbances of a step depend only on (seed, step), so a resumed run ends with the weights of an
    uninterrupted one.

    Args:
        run: directory for checkpoints, softened pictures and the loss log.
        vae: directory of the autoencoder that softens pictures; by default that of the shapes model.

    Raises:
        ModelError: the shapes model is missing.
    """
    run.mkdir(parents=True, exist_ok=True)
    (run / ".gitignore").write_text("*\n", encoding="utf-8")
    torch.manual_seed(settings.seed)
    network = JudgeNetwork()
    average = checkpoint.Average(network, limit=0.995)
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.rate, weight_decay=1e-3)
    path, start = run / "judge.pt", 0
    if resume and path.exists():
        state = checkpoint.load(path)
        network.load_state_dict(state["network"])
        optimizer.load_state_dict(state["optimizer"])
        average.load(state["average"])
        start = int(state["step"])
    if start < settings.steps:
        pictures, soft, labels = _pictures(run, settings, vae or model.model_path() / "vae")
        log = checkpoint.LossLog(run / "judge.jsonl", start)
        network.train()
        with checkpoint.progress("judge network", start, settings.steps) as report:
            for step in range(start, settings.steps):
                batch, batch_labels = _batch(pictures, soft, labels, settings, step)
                rate = checkpoint.learning_rate(step, settings.steps, settings.rate, settings.warmup)
                optimizer.param_groups[0]["lr"] = rate
                loss = loss_of(network(batch), batch_labels, settings.centre_weight)
                torch.autograd.backward(loss)
                torch.nn.utils.clip_grad_norm_(network.parameters(), 5.0)
                optimizer.step()
                optimizer.zero_grad()
                average.update(step)
                log.add(loss.item())
                done, text = step + 1, None
                if done % 25 == 0 or done == settings.steps:
                    text = log.line(done)
                report(done, text)
                if done % settings.save_every == 0 or done == settings.steps:
                    state = {"step": done, "network": network.state_dict(), "average": average.state}
                    checkpoint.save(path, {**state, "optimizer": optimizer.state_dict()})
    network.load_state_dict(average.state)
    return network.eval()


def _pictures(
    run: Path, settings: JudgeSettings, vae: Path
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8], data.Labels]:
    """Return rendered pictures, softened copies of the first of them (stored in `run`), and the labels of all."""
    originals = data.judged_scenes(settings.pictures, settings.seed)
    pictures = vae_stage.render_all(originals)
    key = {name: value for name, value in asdict(settings).items() if name not in ("steps", "save_every")}
    file = run / "softened.pt"
    state: Mapping[str, object] = checkpoint.load(file) if file.exists() else {}
    if state.get("settings") != key:
        soft = data.softened(pictures[: settings.softened], vae, settings.latent_noise, settings.seed)
        state = {"settings": key, "pictures": torch.from_numpy(soft)}
        checkpoint.save(file, state)
    stored = state["pictures"]
    assert isinstance(stored, torch.Tensor)
    return pictures, stored.numpy(), data.labels_of(originals)


def _batch(
    pictures: npt.NDArray[np.uint8],
    soft: npt.NDArray[np.uint8],
    labels: data.Labels,
    settings: JudgeSettings,
    step: int,
) -> tuple[torch.Tensor, data.Labels]:
    """Return a step's pictures [B, 3, 64, 64] in [-1, 1], half of them softened, mirrored and disturbed at random."""
    random = torch.Generator().manual_seed(settings.seed * 1_000_003 + step)
    half = settings.batch // 2
    plain = torch.randint(len(pictures), (settings.batch - half,), generator=random)
    other = torch.randint(len(soft), (half,), generator=random)
    batch = scenes.to_signal(np.concatenate([pictures[plain.numpy()], soft[other.numpy()]]))
    mirrored = torch.rand(settings.batch, generator=random) < 0.5
    batch = torch.where(mirrored[:, None, None, None], batch.flip(-1), batch)
    return data.disturbed(batch, random), labels[torch.cat([plain, other])].mirrored(mirrored)
