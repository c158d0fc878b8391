"""Reference: example inputs and the model's output for them, stored next to an export to verify engines.

The reference of an export from PyTorch is eager PyTorch's output; that of foreign ONNX is ONNX Runtime's output of the
unchanged file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..families import Family

if TYPE_CHECKING:
    import torch

REFERENCE_FILE = "reference.safetensors"
_OUTPUT = "noise_pred"


@dataclass(frozen=True)
class Reference:
    """A UNet's inputs by name, and the ``noise_pred`` that the model computes for them in the export's precision."""

    inputs: Mapping[str, torch.Tensor]
    noise_pred: torch.Tensor


def write_reference(unet: torch.nn.Module, family: Family, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """Run a UNet once, on its device and in its precision, and write the inputs and the output to a file."""
    import torch

    weight = next(unet.parameters())
    halves = (torch.float16, torch.bfloat16)
    converted = {
        name: tensor.to(weight.device, weight.dtype if tensor.dtype in halves else tensor.dtype)
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        noise_pred = unet(**family.arguments(converted), return_dict=False)[0].cpu()
    save_reference(inputs, noise_pred, path)


def save_reference(inputs: Mapping[str, torch.Tensor], noise_pred: torch.Tensor, path: Path) -> None:
    """Write a UNet's inputs and its output to a file."""
    from safetensors.torch import save

    # save_file raises an error class of its own for a full disk, and writes a file that other users cannot read.
    path.write_bytes(save({**inputs, _OUTPUT: noise_pred.contiguous()}))


def read_reference(path: Path) -> Reference:
    """Read the file that ``write_reference`` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return Reference({name: tensor for name, tensor in tensors.items() if name != _OUTPUT}, tensors[_OUTPUT])
