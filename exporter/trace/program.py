"""Tracing: a UNet in memory becomes a PyTorch program with flat inputs and symbolic shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..families import Family, example_inputs
from ..specs import TensorSpec, factors
from .convert import quiet

if TYPE_CHECKING:
    import torch

# From batch 64 on diffusers also calls .contiguous(), which torch.export treats as a different program. The ONNX graph
# is the same.
_LARGEST_TRACED_BATCH = 63


def export_program(
    unet: torch.nn.Module,
    family: Family,
    specs: tuple[TensorSpec, ...],
    dims: Mapping[str, int],
    fixed: Mapping[str, int],
    multiple: int,
    even_batch: bool = False,
) -> torch.export.ExportedProgram:
    """Trace a UNet to a PyTorch program with flat inputs and symbolic shapes.

    Args:
        dims: sizes of the example inputs that the UNet is traced with.
        fixed: dimensions that stay static, with their sizes.
        multiple: number that symbolic heights and widths are a multiple of.
        even_batch: whether the batch is always even.
    """
    import torch

    names = [spec.name for spec in specs]
    symbolic_specs = [spec.fixed(fixed) for spec in specs]
    is_video = family.is_video

    class FlatUNet(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            arguments = family.arguments(dict(zip(names, tensors, strict=True))) | {"return_dict": False}
            if is_video:
                output = _call_video_unet(self.unet, symbolic_specs, tensors, **arguments)[0]
            else:
                output = self.unet(**arguments)[0]
            assert isinstance(output, torch.Tensor)
            return output

    symbol = dim_symbols(multiple, largest_batch=_LARGEST_TRACED_BATCH, is_video=is_video, even_batch=even_batch)
    dynamic = tuple(
        {axis: symbol(dim) for axis, dim in enumerate(spec.shape) if isinstance(dim, str)} for spec in symbolic_specs
    )
    examples = tuple(example_inputs(specs, dims).values())
    with torch.no_grad(), quiet():
        return torch.export.export(FlatUNet().eval(), examples, dynamic_shapes=(dynamic,), strict=False)


def dim_symbols(
    multiple: int, largest_batch: int | None = None, is_video: bool = False, even_batch: bool = False
) -> Callable[[str], Any]:
    """Return a function from a dimension of a ``TensorSpec``, such as ``"height/4"``, to PyTorch's symbol for it.

    Args:
        multiple: number that height and width are a multiple of; no divisor is larger.
        largest_batch: None for no limit.
        is_video: whether the UNet is a video UNet. PyTorch relates batch and frames of a video by itself, because its
            named symbols do not support products.
        even_batch: whether the batch is always even.
    """
    import torch

    units = {side: torch.export.Dim(f"_{side}") for side in ("height", "width")}
    batch = torch.export.Dim("batch", max=largest_batch)
    if even_batch:
        batch = 2 * torch.export.Dim("_pairs", max=largest_batch and largest_batch // 2)
    whole = {"batch": batch, "sequence": torch.export.Dim("sequence")}

    def symbol(dim: str) -> Any:
        parts = factors(dim)
        name = parts.symbols[0]
        if name == "frames" or len(parts.symbols) > 1 or (is_video and name == "batch"):
            return torch.export.Dim.DYNAMIC
        if name in whole:
            return whole[name]
        factor = multiple // parts.divisor
        return units[name] if factor == 1 else factor * units[name]

    return symbol


def _call_video_unet(
    unet: torch.nn.Module, specs: Sequence[TensorSpec], tensors: Sequence[torch.Tensor], **arguments: Any
) -> Any:
    """Call a video UNet in such a way that its trace holds for every batch size and number of frames.

    Inside a video UNet of diffusers all frames are one batch: ``[batch*frames, channels, height, width]``.

    Args:
        specs: specs of the tensors, with symbols for the dimensions that stay symbolic.
        tensors: all tensors in the arguments.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    class RepeatByExpansion(TorchFunctionMode):
        """Repeats by expansion: for a symbolic repetition PyTorch's ONNX exporter (2.13) writes an invalid shape."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is not torch.Tensor.repeat_interleave or kwargs.get("dim") != 0:
                return function(*args, **kwargs)
            tensor, times = args[0], args[1] if len(args) > 1 else kwargs["repeats"]
            inner = tensor.shape[1:]
            return tensor.unsqueeze(1).expand(-1, times, *inner).reshape(tensor.shape[0] * times, *inner)

    # So far the batch of each input is a symbol of its own; make them equal.
    batches = [tensor.shape[0] for spec, tensor in zip(specs, tensors, strict=True) if spec.shape[0] == "batch"]
    for batch in batches[1:]:
        torch._check(batch == batches[0])  # type: ignore[no-untyped-call]
    with RepeatByExpansion():
        return unet(**arguments)
