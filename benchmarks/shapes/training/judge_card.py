"""The text of the judge network's README: how it was trained, how it reads, and what its distances say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...quality.metrics import frechet
from .. import scenes
from ..judge_net.reader import WEIGHTS, JudgeNet, Pictures
from . import checkpoint, vae_stage
from . import judge_data as data
from .judge_evaluate import Evaluation, evaluate

_TEXT = """\
# The judge network

A small convolutional network that reads pictures of `scenes.py` back: background, and colour, shape and place of each
object, from which their number and relation follow. `offcut bench quality` measures distances by its features.

{size} in fp16, {parameters} parameters. It sees pictures as 16x16 cells of 4 pixels, and says for each cell whether an
object's centre lies there, and of which colour and shape.

## Training

{steps} steps in batches of {batch}, last mean loss {loss:.4f}, on {pictures} drawn scenes, every pair of colour and
shape among them, also those that the shapes model never saw. Half of each batch went through that model's autoencoder
with some noise in the latents; blur, noise, mirroring and small changes of brightness and tint came on top. Repeat it
with `python -m offcut.benchmarks.shapes.training.train_judge` (fixed seeds, CPU).

## What it reads

{scenes} newly drawn scenes, weights as stored. Right means without any fault: background, number of objects, colour and
shape of each at its place, relation.

| pictures | {kinds} | all |
|---|{lines}---|
{shares}

Confusion matrices of the pictures as drawn; rows are what was drawn, columns what was read.
{matrices}
## What its distances say

{distance_scenes} drawn scenes, disturbed. The perceptual distance, between 0 and 2, is to the same scene undisturbed.
The Fréchet distance is to {distance_scenes} other scenes, drawn independently, between Gaussians of {width} features.
It is biased upward by small numbers of pictures: the first row is what no difference at all gives with so many, and
only values of equal number compare. It asks what kinds of pictures there are, so that a small shift of all of them is
hardly one.

| disturbance | perceptual distance, mean | Fréchet distance |
|---|---|---|
{distances}

## Limits

It knows these scenes and nothing else; on any other picture its words and distances mean nothing.
"""


@dataclass(frozen=True)
class Distances:
    """Perceptual, of disturbed scenes to the same ones undisturbed, and Fréchet, to other drawn ones."""

    perceptual: float
    frechet: float


def disturbances(pictures: Pictures, vae: Path) -> dict[str, Pictures]:
    """Disturbed copies of pictures, uint8 (N, 64, 64, 3), by what was done to them."""
    random = np.random.default_rng(5)
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()

    def blurred(sigma: float) -> Pictures:
        line = torch.exp(-(torch.arange(-6.0, 7.0) ** 2) / (2 * sigma**2))
        kernel = (line / line.sum())[None, None].repeat(3, 1, 1)
        padded = torch.nn.functional.pad(values, (6, 6, 6, 6), mode="replicate")
        rows = torch.nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
        whole = torch.nn.functional.conv2d(rows, kernel[..., None], groups=3)
        return whole.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    def noisy(deviation: float) -> Pictures:
        noise = random.normal(scale=deviation, size=pictures.shape)
        return np.clip(np.rint(pictures + noise), 0, 255).astype(np.uint8)

    channels_first = np.ascontiguousarray(pictures.transpose(0, 3, 1, 2))
    return {
        "blur, standard deviation 0.5 pixels": blurred(0.5),
        "blur, 1 pixel": blurred(1.0),
        "blur, 2 pixels": blurred(2.0),
        "noise, standard deviation 4 of 255": noisy(4),
        "noise, 16 of 255": noisy(16),
        "shifted by 1 pixel": np.roll(pictures, 1, axis=2),
        "shifted by 4 pixels": np.roll(pictures, 4, axis=2),
        "through the shapes model's autoencoder": data.softened(channels_first, vae, 0.0, 5).transpose(0, 2, 3, 1),
    }


def measure(net: JudgeNet, vae: Path, count: int, seed: int) -> dict[str, Distances]:
    """The distances of `count` drawn scenes, disturbed, to themselves and to other scenes."""
    first, other = (_draw(data.judged_scenes(count, seed + index)) for index in range(2))
    pooled = net.pooled(other)
    return {
        name: Distances(float(net.distance(first, pictures).mean()), frechet(net.pooled(pictures), pooled))
        for name, pictures in {"none": first, **disturbances(first, vae)}.items()
    }


def _draw(drawn: list[scenes.Scene]) -> Pictures:
    return np.ascontiguousarray(vae_stage.draw(drawn).transpose(0, 2, 3, 1))


def evaluations(net: JudgeNet, vae: Path, count: int, seed: int) -> dict[str, Evaluation]:
    """How the network reads `count` drawn scenes, as drawn and as the autoencoder shows them."""
    drawn = data.judged_scenes(count, seed)
    pictures = vae_stage.draw(drawn)
    seen = {"as drawn": pictures, "through the shapes model's autoencoder": data.softened(pictures, vae, 0.0, seed)}
    return {name: evaluate(drawn, net.read(_last(made))) for name, made in seen.items()}


def _last(pictures: Pictures) -> Pictures:
    return np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))


def judge_card(
    run: Path,
    directory: Path,
    pictures: int,
    batch: int,
    read: Mapping[str, Evaluation],
    distances: Mapping[str, Distances],
    distance_scenes: int,
    width: int,
) -> str:
    """The README beside the weights in `directory`, of a training that left its log in `run`.

    Args:
        pictures, batch: of the training.
        read: by how the pictures were made; `evaluations` gives it.
        distances: by what was done to the pictures, of `distance_scenes` scenes and `width` features.
    """
    from safetensors.torch import load_file

    rows = checkpoint.read_log(run / "judge.jsonl")
    plain = read["as drawn"]
    kinds = list(plain.by_kind)
    weights = load_file(directory / WEIGHTS)
    return _TEXT.format(
        size=f"{(directory / WEIGHTS).stat().st_size / 1e6:.2f} MB",
        parameters=f"{sum(value.numel() for value in weights.values()):,}",
        steps=int(rows[-1]["step"]) if rows else 0,
        loss=rows[-1]["loss"] if rows else float("nan"),
        batch=batch,
        pictures=pictures,
        scenes=plain.scenes,
        kinds=" | ".join(kinds),
        lines="---|" * len(kinds),
        shares="\n".join(
            f"| {name} | " + " | ".join(f"{e.by_kind[kind]:.1%}" for kind in kinds) + f" | {e.right:.1%} |"
            for name, e in read.items()
        ),
        matrices="".join(
            f"\n{name.capitalize()}, {matrix.right:.2%} right:\n\n{matrix.table()}\n"
            for name, matrix in plain.matrices.items()
        ),
        distance_scenes=distance_scenes,
        width=width,
        distances="\n".join(f"| {name} | {d.perceptual:.4f} | {d.frechet:.4f} |" for name, d in distances.items()),
    )
