"""The text of the judge network's README: its training, its accuracy, and examples of its distances."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ...quality.metrics import frechet
from ..judge_net.reader import WEIGHTS, JudgeNet, Pictures
from . import checkpoint, vae_stage
from . import judge_data as data
from .judge_evaluate import Evaluation, evaluate

_TEXT = """\
# The judge network

A small convolutional network that finds the background, and the colour, shape and place of each object, in pictures of
`scenes.py`; number and relation follow from these. `offcut bench quality` measures distances with its features.

{size} in fp16, {parameters} parameters. For each of 16x16 cells of 4 pixels, the network predicts whether the cell
contains the centre of an object, and the colour and shape of this object.

## Training

{steps} steps in batches of {batch}, last mean loss {loss:.4f}, on {pictures} rendered scenes. They contain every pair
of colour and shape, also those that the shapes model never saw. Half of each batch went through that model's
autoencoder with some noise in the latents. Blur, noise, mirroring and small changes of brightness and tint were added.
Repeat it with `python -m offcut.benchmarks.shapes.training.train_judge` (fixed seeds, CPU).

## Accuracy

Share of {scenes} new rendered scenes that the stored weights read without any error: background, number of objects,
colour and shape of each object at its place, and relation.

| pictures | {kinds} | all |
|---|{lines}---|
{shares}

Confusion matrices of the pictures as rendered; rows are the words of the scene, columns the words that were read.
{matrices}
## Examples of distances

{distance_scenes} rendered scenes with a disturbance. The perceptual distance, between 0 and 2, is to the same scene
without the disturbance. The Fréchet distance is to {distance_scenes} other scenes, between Gaussians of {width}
features. Small numbers of pictures bias it upward: the first row is the value without a disturbance, and only values
of the same number of pictures are comparable. It compares the distributions of the pictures, and therefore hardly
changes when all pictures shift a little.

| disturbance | perceptual distance, mean | Fréchet distance |
|---|---|---|
{distances}

## Limits

The network was trained only on these scenes; on other pictures its results and distances have no meaning.
"""


@dataclass(frozen=True)
class Distances:
    """Perceptual distance of disturbed scenes to the undisturbed ones, and Fréchet distance to other scenes."""

    perceptual: float
    frechet: float


def disturbances(pictures: Pictures, vae: Path) -> dict[str, Pictures]:
    """Return disturbed copies of pictures, uint8 (N, 64, 64, 3), by the name of the disturbance."""
    random = np.random.default_rng(5)
    values = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()

    def blurred(sigma: float) -> Pictures:
        line = torch.exp(-(torch.arange(-6.0, 7.0) ** 2) / (2 * sigma**2))
        kernel = (line / line.sum())[None, None].repeat(3, 1, 1)
        padded = torch.nn.functional.pad(values, (6, 6, 6, 6), mode="replicate")
        rows = torch.nn.functional.conv2d(padded, kernel[:, :, None], groups=3)
        smooth = torch.nn.functional.conv2d(rows, kernel[..., None], groups=3)
        return smooth.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()

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
    """Return the distances of `count` disturbed scenes by the name of the disturbance."""
    sets = (vae_stage.render_all(data.judged_scenes(count, seed + index)) for index in range(2))
    first, other = map(_channels_last, sets)
    pooled = net.pooled(other)
    return {
        name: Distances(float(net.distance(first, pictures).mean()), frechet(net.pooled(pictures), pooled))
        for name, pictures in {"none": first, **disturbances(first, vae)}.items()
    }


def evaluations(net: JudgeNet, vae: Path, count: int, seed: int) -> dict[str, Evaluation]:
    """Return how well the network reads `count` scenes, as rendered and after the autoencoder."""
    originals = data.judged_scenes(count, seed)
    rendered = vae_stage.render_all(originals)
    kinds = {"as rendered": rendered, "through the shapes model's autoencoder": data.softened(rendered, vae, 0.0, seed)}
    return {name: evaluate(originals, net.read(_channels_last(pictures))) for name, pictures in kinds.items()}


def _channels_last(pictures: Pictures) -> Pictures:
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
    """Return the README for the weights in `directory`, whose training left its log in `run`.

    Args:
        pictures, batch: number of pictures and size of a batch in the training.
        read: result of `evaluations`.
        distances: result of `measure`, for `distance_scenes` scenes and `width` features.
    """
    from safetensors.torch import load_file

    rows = checkpoint.read_log(run / "judge.jsonl")
    plain = read["as rendered"]
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
