"""Other weights for a graph that ONNX Runtime opens: in the graph where they are small, else in memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def with_weights(content: bytes, weights: Mapping[str, torch.Tensor]) -> tuple[bytes, dict[str, torch.Tensor]]:
    """A graph with those of these weights that it stores itself, and those that it keeps in a file.

    Args:
        content: the graph, without what is in other files.
        weights: by initializer; others than the graph's are left out.
    """
    import onnx

    model = onnx.load_from_string(content)
    beside = {}
    for tensor in model.graph.initializer:
        value = weights.get(tensor.name)
        if value is None:
            continue
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            beside[tensor.name] = value
        else:
            kept = onnx.TensorProto(
                name=tensor.name, data_type=tensor.data_type, dims=tensor.dims, raw_data=_raw(value)
            )
            tensor.CopyFrom(kept)
    return model.SerializeToString(), beside


def give(settings: Any, weights: Mapping[str, torch.Tensor], element_types: Mapping[str, int]) -> list[Any]:
    """Let a session that these settings open take these weights from memory.

    Returns:
        What must live until the session is open.
    """
    import onnxruntime
    import torch

    values = []
    for tensor in weights.values():
        flat = tensor.cpu().contiguous()
        kind = element_types[str(flat.dtype).removeprefix("torch.")]
        array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
        values.append(onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, kind))
    if values:
        settings.add_external_initializers(list(weights), values)
    return values


def _raw(tensor: torch.Tensor) -> bytes:
    """A tensor's values as ONNX stores them."""
    import torch

    return tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes()
