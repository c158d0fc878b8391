"""LPIPS, CLIP score and FID by torchmetrics, with the user's networks: nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import UserError
from ..stats import require
from .metrics import Pictures

_BACKBONES = {"alexnet": "alex", "vgg16": "vgg", "squeezenet1_1": "squeeze"}
"""torchmetrics' names of backbones, by the start of torchvision's file name."""

_BATCH = 64


class External:
    """The user's networks, opened.

    Args:
        lpips: backbone weights as torchvision publishes them, e.g. ``alexnet-owt-7be5be79.pth``; torchmetrics brings
            the learned weights of its layers.
        clip: directory of a CLIP model with its processor, as transformers saves them.
        fid: a TorchScript file that takes uint8 [N, 3, H, W] and gives features [N, D].

    Raises:
        UserError: one of them cannot be read.
        MissingExtraError: a package for one is missing.
    """

    def __init__(self, *, lpips: Path | None = None, clip: Path | None = None, fid: Path | None = None) -> None:
        require("LPIPS, CLIP score and FID", "torchmetrics")
        self._lpips = None if lpips is None else _open_lpips(lpips)
        self._clip = None if clip is None else _open_clip(clip)
        self._fid = None if fid is None else _open_fid(fid)

    def figures(
        self, made: Pictures, prompts: Sequence[str], against: Pictures | None, real: Pictures
    ) -> dict[str, float]:
        """Return the figures by name.

        Args:
            made: images of the prompts, uint8 (N, H, W, 3).
            against: the uncached images of the same prompts and seeds, for LPIPS; None leaves LPIPS out.
            real: rendered scenes, for FID.
        """
        found = {}
        if self._lpips is not None and against is not None:
            for one, other in zip(_tensors(made), _tensors(against), strict=True):
                self._lpips.update(one.float() / 127.5 - 1, other.float() / 127.5 - 1)
            found["lpips"] = _result(self._lpips)
        if self._clip is not None:
            for first, batch in enumerate(_tensors(made)):
                self._clip.update(list(batch), list(prompts[first * _BATCH : first * _BATCH + len(batch)]))
            found["clip score"] = _result(self._clip)
        if self._fid is not None:
            for pictures, is_real in ((real, True), (made, False)):
                for batch in _tensors(pictures):
                    self._fid.update(batch, real=is_real)
            found["fid"] = _result(self._fid)
        return found


def _result(metric: Any) -> float:
    value = float(metric.compute())
    metric.reset()
    return value


def _tensors(pictures: Pictures) -> Iterator[torch.Tensor]:
    """Yield batches [B, 3, H, W], uint8."""
    for first in range(0, len(pictures), _BATCH):
        yield torch.from_numpy(pictures[first : first + _BATCH]).permute(0, 3, 1, 2).contiguous()


def _open_lpips(weights: Path) -> Any:
    try:
        import torchvision  # noqa: F401
    except ImportError as error:
        raise UserError(
            "LPIPS needs the package torchvision, which is not installed: pip install torchvision"
        ) from error
    except RuntimeError as error:
        raise UserError(
            f"torchvision does not fit this PyTorch ({_first_line(error)}): install both from one place"
        ) from error
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    net = next((name for start, name in _BACKBONES.items() if weights.name.startswith(start)), None)
    if net is None or not weights.is_file():
        raise UserError(
            f"{weights} is not a backbone for LPIPS: give torchvision's weight file of {', '.join(_BACKBONES)}, "
            "under the name that it was published with"
        )
    try:
        with _in_place_of_a_download(weights):
            return LearnedPerceptualImagePatchSimilarity(net_type=net)
    except (RuntimeError, OSError, ValueError) as error:
        raise UserError(f"{weights} cannot be read as torchvision's weights: {_first_line(error)}") from error


@contextmanager
def _in_place_of_a_download(weights: Path) -> Iterator[None]:
    """Let torch.hub find a weight file in the place of a download."""
    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / weights.name).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            yield
        finally:
            torch.hub.set_dir(before)


class _Tensors(nn.Module):
    """A CLIP model that returns its features as tensors; newer versions of transformers wrap them in an output."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_features(self, *arguments: Any) -> torch.Tensor:
        return _pooled(self.model.get_image_features(*arguments))

    def get_text_features(self, *arguments: Any) -> torch.Tensor:
        return _pooled(self.model.get_text_features(*arguments))


def _pooled(output: Any) -> torch.Tensor:
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features


def _open_clip(folder: Path) -> Any:
    from torchmetrics.multimodal import CLIPScore
    from transformers import CLIPModel, CLIPProcessor

    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: give that of a CLIP model with its processor")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder} cannot be read as a CLIP model with its processor: {_first_line(error)}") from error
    return CLIPScore(model_name_or_path=lambda: (_Tensors(model), processor))


def _open_fid(file: Path) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    load: Any = torch.jit.load  # which has no annotations
    try:
        network = load(file, map_location="cpu").eval()
        with torch.inference_mode():
            shape = network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be used as a network for FID ({_first_line(error)}): give a TorchScript file that takes "
            "uint8 [N, 3, H, W] and gives features [N, D]"
        ) from error
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(f"{file} gives {list(shape)} for 2 images, not features [N, D]: give another network for FID")
    return FrechetInceptionDistance(feature=network, input_img_size=(3, 64, 64))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
