"""What it takes to trace a video UNet with a symbolic number of frames.

Inside, every video UNet of diffusers has its frames one after the other, ``[batch*frames, channels, height, width]``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..specs import TensorSpec

if TYPE_CHECKING:
    import torch


def call(unet: torch.nn.Module, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], **arguments: Any) -> Any:
    """Call the UNet so that its trace holds for every batch and number of frames.

    Args:
        specs: of the tensors, those that stay symbolic as symbols.
        tensors: all that the arguments hold.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class Expanding(TorchFunctionMode):
        """Repeats by expansion: PyTorch's ONNX exporter (2.13) writes an invalid shape for a symbolic repetition."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is not torch.Tensor.repeat_interleave or kwargs.get("dim") != 0:
                return function(*args, **kwargs)
            tensor, times = args[0], args[1] if len(args) > 1 else kwargs["repeats"]
            inner = tensor.shape[1:]
            return tensor.unsqueeze(1).expand(-1, times, *inner).reshape(tensor.shape[0] * times, *inner)

    # Each input's batch is a symbol of its own until here.
    batches = [tensor.shape[0] for spec, tensor in zip(specs, tensors, strict=True) if spec.shape[0] == "batch"]
    for batch in batches[1:]:
        torch._check(batch == batches[0])  # type: ignore[no-untyped-call]
    with Expanding():
        return unet(**arguments)
