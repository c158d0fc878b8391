"""LPIPS, CLIP score and FID with networks on the user's disk; nothing is downloaded."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...errors import UserError
from ..stats import require
from .metrics import Pictures

_BACKBONES = {"alexnet": "alex", "vgg16": "vgg", "squeezenet1_1": "squeeze"}
"""torchmetrics' names of the backbones, by the beginning of torchvision's file name."""

_BATCH = 64


class ExternalNetworks:
    """Networks of the user that judge images: LPIPS, CLIP and FID, as far as given.

    Args:
        lpips: weight file of a backbone as torchvision publishes it, e.g. ``alexnet-owt-7be5be79.pth``; torchmetrics
            has the learned weights of the layers.
        clip: directory of a CLIP model with its processor, in transformers' format.
        fid: TorchScript file that maps uint8 [N, 3, H, W] to features [N, D].

    Raises:
        UserError: a network cannot be read.
        MissingExtraError: torchmetrics is missing.
    """

    def __init__(self, *, lpips: Path | None = None, clip: Path | None = None, fid: Path | None = None) -> None:
        require("LPIPS, CLIP score and FID", "torchmetrics")
        self._lpips = lpips and _open_lpips(lpips)
        self._clip = clip and _open_clip(clip)
        self._fid = fid and _open_fid(fid)

    def figures(
        self, pictures: Pictures, prompts: Sequence[str], uncached: Pictures | None, rendered: Pictures
    ) -> dict[str, float]:
        """Return the figures by name: ``lpips``, ``clip score`` and ``fid``, where the network is open.

        Args:
            pictures: one image for each prompt, uint8 (N, H, W, 3).
            uncached: images of the uncached run in the same order, for LPIPS; None omits LPIPS.
            rendered: rendered scenes of the prompts, for FID.
        """
        figures = {}
        if self._lpips and uncached is not None:
            for one, other in zip(_batches(pictures), _batches(uncached), strict=True):
                self._lpips.update(one.float() / 127.5 - 1, other.float() / 127.5 - 1)
            figures["lpips"] = _result(self._lpips)
        if self._clip:
            figures["clip score"] = _clip_score(*self._clip, pictures, prompts)
        if self._fid:
            for images, is_real in ((rendered, True), (pictures, False)):
                for batch in _batches(images):
                    self._fid.update(batch, real=is_real)
            figures["fid"] = _result(self._fid)
        return figures


def _result(metric: Any) -> float:
    value = float(metric.compute())
    metric.reset()
    return value


def _batches(pictures: Pictures) -> Iterator[torch.Tensor]:
    """Yield batches [B, 3, H, W], uint8."""
    images = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    for first in range(0, len(images), _BATCH):
        yield images[first : first + _BATCH]


@torch.inference_mode()
def _clip_score(model: Any, processor: Any, pictures: Pictures, prompts: Sequence[str]) -> float:
    """Return 100 times the mean cosine between image and text, at least 0 (Hessel et al. 2021, torchmetrics' scale).

    The CLIPScore of torchmetrics 1.9 does not accept the features of transformers 5.
    """
    cosines = []
    for first, batch in enumerate(_batches(pictures)):
        texts = list(prompts[first * _BATCH : first * _BATCH + len(batch)])
        inputs = processor(text=texts, images=list(batch), return_tensors="pt", padding=True, truncation=True)
        output = model(**inputs)
        cosines.append((output.image_embeds * output.text_embeds).sum(dim=-1))
    return max(0.0, 100 * float(torch.cat(cosines).mean()))


def _open_lpips(weights: Path) -> Any:
    net = next((name for start, name in _BACKBONES.items() if weights.name.startswith(start)), None)
    if net is None or not weights.is_file():
        raise UserError(
            f"{weights} is not a backbone for LPIPS: give torchvision's weight file of {', '.join(_BACKBONES)}, "
            "under its published name"
        )
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision was built for another PyTorch
        raise UserError(
            f"LPIPS needs torchvision, which cannot be imported ({_first_line(error)}): pip install torchvision"
        ) from error
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    before = torch.hub.get_dir()
    with tempfile.TemporaryDirectory() as folder:  # torchvision looks for the file in its download folder
        (Path(folder) / "checkpoints").mkdir()
        (Path(folder) / "checkpoints" / weights.name).symlink_to(weights.resolve())
        torch.hub.set_dir(folder)
        try:
            return LearnedPerceptualImagePatchSimilarity(net_type=net)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"{weights} cannot be read as torchvision's weights: {_first_line(error)}") from error
        finally:
            torch.hub.set_dir(before)


def _open_clip(folder: Path) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    if not folder.is_dir():
        raise UserError(f"{folder} is not a directory: give the directory of a CLIP model with its processor")
    try:
        model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        return model, CLIPProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"{folder} cannot be read as a CLIP model with its processor: {_first_line(error)}") from error


def _open_fid(file: Path) -> Any:
    from torchmetrics.image.fid import FrechetInceptionDistance

    load: Any = torch.jit.load  # it has no annotations
    try:
        network = load(file, map_location="cpu").eval()
        with torch.inference_mode():
            shape = network(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)).shape
    except (RuntimeError, ValueError, OSError, AttributeError) as error:
        raise UserError(
            f"{file} cannot be used as a network for FID ({_first_line(error)}): give a TorchScript file that maps "
            "uint8 [N, 3, H, W] to features [N, D]"
        ) from error
    if len(shape) != 2 or shape[0] != 2:
        raise UserError(f"{file} returns {list(shape)} for 2 images, not [N, D]: give another network for FID")
    return FrechetInceptionDistance(feature=network, input_img_size=(3, 64, 64))


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".")
