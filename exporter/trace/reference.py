"""What eager PyTorch computes for a few inputs, kept beside the export: any engine can be held against it, anywhere.

Of ONNX that was made elsewhere it is what ONNX Runtime computes with the untouched file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..families import Family, example_inputs
from ..specs import TensorSpec

if TYPE_CHECKING:
    import torch

REFERENCE_FILE = "reference.safetensors"
_OUTPUT = "noise_pred"


@dataclass(frozen=True)
class Reference:
    """Inputs of the UNet by name, and ``noise_pred`` as the model computed it in the export's precision."""

    inputs: Mapping[str, torch.Tensor]
    noise_pred: torch.Tensor


def write_reference(
    unet: torch.nn.Module, family: Family, specs: tuple[TensorSpec, ...], dims: Mapping[str, int], path: Path
) -> None:
    """Run the UNet once at these dimensions, where it is and in its own precision, and keep inputs and output."""
    write_answer(unet, family, example_inputs(specs, dims), path)


def write_answer(unet: torch.nn.Module, family: Family, inputs: Mapping[str, torch.Tensor], path: Path) -> None:
    """The same for inputs that are there."""
    import torch

    weight = next(unet.parameters())
    halves = (torch.float16, torch.bfloat16)
    given = {
        name: tensor.to(weight.device, weight.dtype if tensor.dtype in halves else tensor.dtype)
        for name, tensor in inputs.items()
    }
    with torch.no_grad():
        noise_pred = unet(**family.arguments(given), return_dict=False)[0].cpu()
    save_reference(inputs, noise_pred, path)


def save_reference(inputs: Mapping[str, torch.Tensor], noise_pred: torch.Tensor, path: Path) -> None:
    """Write inputs and output to a file."""
    from safetensors.torch import save

    # save_file would hide a full disk in an error of its own, and keep other users from reading.
    path.write_bytes(save({**inputs, _OUTPUT: noise_pred.contiguous()}))


def read_reference(path: Path) -> Reference:
    """What ``write_reference`` kept."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    return Reference({name: tensor for name, tensor in tensors.items() if name != _OUTPUT}, tensors[_OUTPUT])
