"""The trained judge network, which reads images and measures distances between them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from ....errors import ModelError
from .. import judge, scenes
from .network import CELL, CELLS, Features, JudgeNetwork

DIRECTORY = Path(__file__).parent / "weights"
WEIGHTS = "judge.safetensors"

Pictures = npt.NDArray[np.uint8]
"""uint8 (N, 64, 64, 3), sRGB."""

_SEEN = 0.5  # minimum heat of a cell that contains the centre of an object
_WINDOW = 5  # side in cells of the square in which only the hottest cell counts; it contains only one object's centre
_BATCH = 128


@dataclass(frozen=True)
class Reading:
    """The content of an image: its background, and its objects with the most certain first."""

    background: str
    objects: tuple[judge.SeenObject, ...]

    def verdict(self, text: str) -> judge.SceneVerdict:
        """Return which parts of a caption the image obeys.

        Raises:
            ValueError: `text` is not a caption of `scenes`.
        """
        return judge.compare(text, self.background, self.objects)


class JudgeNet:
    """The network with its weights in fp32 on the CPU; equal images have equal results."""

    def __init__(self, network: JudgeNetwork) -> None:
        self._network = network.eval()

    @classmethod
    def load(cls, directory: Path = DIRECTORY) -> JudgeNet:
        """Return the network in a directory, by default the one in the package.

        Raises:
            ModelError: the directory has no network, or that of another version.
        """
        from safetensors.torch import load_file

        path = directory / WEIGHTS
        if not path.exists():
            raise ModelError(f"the judge network is missing from {directory}: reinstall offcut")
        network = JudgeNetwork()
        state = network.state_dict()
        weights = load_file(path)
        if weights.keys() != {name for name, value in state.items() if value.is_floating_point()}:
            raise ModelError(f"{path} has the network of another version: reinstall offcut")
        network.load_state_dict(state | {name: value.float() for name, value in weights.items()})
        return cls(network)

    def save(self, directory: Path) -> Path:
        """Write the weights in fp16 and return the path of their file."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        state = self._network.state_dict()
        weights = {name: value.half().contiguous() for name, value in state.items() if value.is_floating_point()}
        save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)
        return directory / WEIGHTS

    def read(self, pictures: Pictures) -> list[Reading]:
        """Return the content of each image.

        Raises:
            ValueError: the images are not uint8 (N, 64, 64, 3).
        """
        readings = []
        for signal in _signals(pictures):
            with torch.inference_mode():
                maps = self._network(signal)
            heat = maps.centre.sigmoid()
            highest = functional.max_pool2d(heat[:, None], _WINDOW, stride=1, padding=_WINDOW // 2)[:, 0]
            peaks = (heat == highest) & (heat > _SEEN)
            colours, shapes = maps.colour.argmax(dim=1), maps.shape.argmax(dim=1)
            for index, ground in enumerate(maps.background.argmax(dim=1).tolist()):
                objects = [
                    judge.SeenObject(
                        list(scenes.COLOURS)[int(colours[index, row, column])],
                        scenes.SHAPES[int(shapes[index, row, column])],
                        *_middle(heat[index], row, column),
                        float(heat[index, row, column]),
                    )
                    for row, column in peaks[index].nonzero().tolist()
                ]
                objects.sort(key=lambda seen: -seen.certainty)
                readings.append(Reading(list(scenes.BACKGROUNDS)[ground], tuple(objects)))
        return readings

    def pooled(self, pictures: Pictures) -> npt.NDArray[np.float64]:
        """Return features for the Fréchet distance, (N, 160): the mean over each image of the two deepest layers.

        Raises:
            ValueError: the images are not uint8 (N, 64, 64, 3).
        """
        parts = [features.pooled for features in self._features(pictures)]
        return np.asarray(torch.cat(parts).double().numpy())

    def distance(self, first: Pictures, second: Pictures) -> npt.NDArray[np.float64]:
        """Return the perceptual distance of each pair of images, (N,): 0 for equal ones, at most 2.

        This is LPIPS without learned weights (arXiv 1801.03924, equation 1). In each of four layers the feature vector
        at each place is normalized to length 1. The squared differences are summed over channels, then averaged over
        places and layers.

        Raises:
            ValueError: the images are not uint8 (N, 64, 64, 3), or their numbers differ.
        """
        if first.shape != second.shape:
            raise ValueError(f"the pictures are {first.shape} and {second.shape}; pass the same number of both.")
        parts = []
        for one, other in zip(self._features(first), self._features(second), strict=True):
            layers = [
                (functional.normalize(a, dim=1) - functional.normalize(b, dim=1)).square().sum(dim=1).mean(dim=(1, 2))
                for a, b in zip(one.maps, other.maps, strict=True)
            ]
            parts.append(torch.stack(layers).mean(dim=0))
        return np.asarray(torch.cat(parts).double().numpy())

    def _features(self, pictures: Pictures) -> Iterator[Features]:
        for signal in _signals(pictures):
            with torch.inference_mode():  # ends before the yield, so that it does not affect the caller
                features = self._network.features(signal)
            yield features


def _signals(pictures: Pictures) -> Iterator[torch.Tensor]:
    """Yield batches [B, 3, 64, 64] in [-1, 1]."""
    expected = (scenes.IMAGE_SIZE, scenes.IMAGE_SIZE, 3)
    if pictures.ndim != 4 or pictures.shape[1:] != expected or pictures.dtype != np.uint8 or not len(pictures):
        raise ValueError(f"the pictures are {pictures.dtype} {pictures.shape}; pass uint8 (N, *{expected}), N > 0.")
    for first in range(0, len(pictures), _BATCH):
        yield scenes.to_signal(pictures[first : first + _BATCH].transpose(0, 3, 1, 2))


def _middle(heat: torch.Tensor, row: int, column: int) -> tuple[float, float]:
    """Return x and y, in pixels, of the heat's centre of mass around a cell of a map [16, 16]."""
    top, left = max(0, row - 1), max(0, column - 1)
    window = heat[top : min(CELLS, row + 2), left : min(CELLS, column + 2)]
    total = float(window.sum())
    x = float((window.sum(dim=0) * torch.arange(window.shape[1])).sum()) / total + left
    y = float((window.sum(dim=1) * torch.arange(window.shape[0])).sum()) / total + top
    return (x + 0.5) * CELL, (y + 0.5) * CELL


def verdicts(net: JudgeNet, pictures: Pictures, texts: Sequence[str]) -> list[judge.SceneVerdict]:
    """Return the network's verdict on each image and its caption."""
    return [reading.verdict(text) for reading, text in zip(net.read(pictures), texts, strict=True)]


def obeyed(net: JudgeNet, pictures: Pictures, texts: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return 1 for each image that obeys its whole caption, by the network, and 0 for the others: (N,)."""
    return np.array([verdict.right for verdict in verdicts(net, pictures, texts)], dtype=np.float64)
